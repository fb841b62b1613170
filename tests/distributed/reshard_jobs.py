"""Every layout writes one checkpoint, and every layout reads all of them: what the processes do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
import xxhash
from safetensors.torch import load_file

from megagpt.checkpoint.tensors import WEIGHT, TensorSlice
from megagpt.config.schema import TrainingRun
from megagpt.engine.engine import Engine
from megagpt.engine.slices import state_tensors
from megagpt.parallel.mesh import Mesh
from megagpt.train.state import TrainState
from tests.distributed.engines import engine_for, join, leave, restore, save, train

FEW = 5
"""Steps after which equal states would no longer be equal if they had not been."""
RESTORED = ("loss_scale", "scaler_iter", "last_overflow_iter", "hysteresis")


@dataclass(frozen=True)
class Written:
    """A checkpoint, and what is known of it by other means."""

    name: str
    step_dir: Path
    truth: Path
    """The logical tensors, whole, as the test has put them together: a safetensors file."""


@dataclass(frozen=True)
class Laid:
    """A layout, and what it is to do."""

    name: str
    config: TrainingRun
    write: Path | None = None
    """Folder of a store to save into after `first` steps."""
    first: int = 0
    last: int = 0
    """Steps to go to, from 0 or from where a checkpoint stands."""
    read: tuple[Written, ...] = ()
    """To be restored one after the other into one engine, and compared."""
    go_on: tuple[Written, ...] = ()
    """To go on from, each in an engine of its own."""
    same: tuple[Written, ...] = ()
    """As `go_on`, for a few steps: whose losses shall be the same to the last bit."""
    alike: tuple[Written, ...] = ()
    """One state in the files of many layouts: what is held after each is restored shall be the same to the last bit."""
    save_again: Path | None = None
    """Folder of a store to save the first of `go_on` into, as soon as it is loaded."""


@dataclass
class Shown:
    """What a layout showed."""

    losses: list[float] = field(default_factory=list)
    """Of its own run, without a break."""
    differing: dict[str, list[str]] = field(default_factory=dict)
    """Checkpoint -> what was not as it is in there; an empty list for each that was read."""
    continued: dict[str, list[float]] = field(default_factory=dict)
    """Checkpoint -> losses from there on."""
    digests: dict[str, list[str]] = field(default_factory=dict)
    """Checkpoint -> for each rank, a hash of all that it holds."""
    bytes_read: dict[str, list[int]] = field(default_factory=dict)
    """Checkpoint -> for each rank, bytes of values that it read."""
    bytes_held: list[int] = field(default_factory=list)
    """For each rank, bytes of the weights and the optimizer's state that it fills."""


def run_layouts(layouts: list[Laid], out: Path) -> None:
    """In every process of a group: let the layouts, all of the same degrees, do their part in turn."""
    mesh = join(layouts[0].config)
    shown = {}
    for laid in layouts:
        shown[laid.name] = found = Shown()
        if laid.write is not None:
            found.losses = _own_run(laid, mesh)
        if laid.read:
            _read_all(laid, mesh, found)
        for written in laid.go_on:
            found.continued[written.name] = _go_on(laid, written, mesh, laid.last)
        for written in laid.same:
            found.continued[written.name] = _go_on(laid, written, mesh, laid.first + FEW)
        if laid.alike:
            _hold_alike(laid, mesh, found)
    if mesh.is_main:
        out.write_text(json.dumps({name: vars(value) for name, value in shown.items()}))
    leave(mesh)


def read_shown(out: Path) -> dict[str, Shown]:
    return {name: Shown(**values) for name, values in json.loads(out.read_text()).items()}


def _own_run(laid: Laid, mesh: Mesh) -> list[float]:
    """Save in the middle of a run that goes on."""
    engine = engine_for(laid.config, mesh)
    state, before = train(engine, laid.config, TrainState(), laid.first)
    save(engine, laid.config, state, laid.write)
    return before + train(engine, laid.config, state, laid.last)[1]


def _go_on(laid: Laid, written: Written, mesh: Mesh, last: int) -> list[float]:
    engine = engine_for(laid.config, mesh)
    state, _ = restore(engine, written.step_dir)
    if laid.save_again is not None and written is laid.go_on[0]:
        save(engine, laid.config, state, laid.save_again)
    return train(engine, laid.config, state, last)[1]


def _hold_alike(laid: Laid, mesh: Mesh, found: Shown) -> None:
    """Restore one after the other, with a step of training before each: what is not restored would differ.

    Then go on, in this engine from the first of them and in a new one from the last.
    """
    engine = engine_for(laid.config, mesh)
    state, _ = restore(engine, laid.alike[-1].step_dir)
    for written in laid.alike:
        train(engine, laid.config, state, laid.first + 1)
        state, _ = restore(engine, written.step_dir)
        found.digests[written.name] = mesh.gather(_digest(engine, state))
    train(engine, laid.config, state, laid.first + 1)
    state, _ = restore(engine, laid.alike[0].step_dir)
    found.continued["from the first"] = train(engine, laid.config, state, laid.first + FEW)[1]
    engine = engine_for(laid.config, mesh)
    state, _ = restore(engine, laid.alike[-1].step_dir)
    found.continued["from the last"] = train(engine, laid.config, state, laid.last)[1]


def _digest(engine: Engine, state: TrainState) -> str:
    """Of every weight and moment on this process, counters and settings of the groups: what the next steps hang on."""
    tensors = state_tensors(engine.optimizer, engine.model)
    digest = xxhash.xxh3_128()
    for kind in ("weights", "optimizer"):
        for tensor in tensors[kind]:
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    groups = [  # the rate is set anew in each step
        {key: value for key, value in one.items() if key not in ("params", "lr")}
        for one in engine.optimizer.param_groups
    ]
    digest.update(repr((engine.engine_state(), state, groups)).encode())
    return digest.hexdigest()


def _read_all(laid: Laid, mesh: Mesh, found: Shown) -> None:
    optim = laid.config.optim.model_copy(update={"lr": 0.5, "betas": (0.7, 0.8), "eps": 1e-6, "weight_decay": 0.03})
    laid = replace(laid, config=laid.config.model_copy(update={"optim": optim}))  # not as any of them was written under
    engine = engine_for(laid.config, mesh)
    for written in laid.read:
        state, n_bytes = restore(engine, written.step_dir)
        truth, parts = _truth(written.truth), list(engine.owned_slices())
        mine = [*_wrong_slices(parts, truth), *_wrong_weights(engine, truth), *_wrong_counters(engine, state)]
        mine += _wrong_settings(engine, laid.config)
        numels = mesh.gather({f"{part.name}|{kind}": v.numel() for part in parts for kind, v in part.values.items()})
        for key, whole in truth.items():
            if sum(rank.get(key, 0) for rank in numels) != whole.numel():
                mine.append(f"{key}: the ranks together do not hold it once")
        found.differing[written.name] = sorted({problem for rank in mesh.gather(mine) for problem in rank})
        found.bytes_read[written.name] = mesh.gather(n_bytes)
    found.bytes_held = mesh.gather(_bytes_held(engine))


@cache
def _truth(path: Path) -> dict[str, torch.Tensor]:
    """Each layout of a group looks at it."""
    return load_file(path)


def _wrong_slices(parts: list[TensorSlice], truth: dict[str, torch.Tensor]) -> Iterator[str]:
    """fp32 weights and moments that a process would write, beside the part of the whole that they stand for."""
    for part in parts:
        for kind, values in part.values.items():
            expected = _expected(part, truth[f"{part.name}|{kind}"])
            if not torch.equal(values.cpu().view(torch.int32), expected.view(torch.int32)):
                yield f"{part.name}|{kind} from {part.start} on"


def _expected(part: TensorSlice, whole: torch.Tensor) -> torch.Tensor:
    held = part.shard.cut(whole) if part.shard is not None else whole
    return held.flatten()[part.start : part.start + part.values[WEIGHT].numel()].contiguous()


def _wrong_weights(engine: Engine, truth: dict[str, torch.Tensor]) -> Iterator[str]:
    """What forward and backward work with, in the run's precision."""
    model = engine.model
    for name, parameter in model.named_parameters():
        whole = truth[f"{model.logical_name(name)}|{WEIGHT}"]
        shard = model.shards.get(name)
        held = (shard.cut(whole) if shard is not None else whole).to(engine.dtype).flatten()
        values = parameter.detach().flatten()
        if hasattr(parameter, "ds_tensor"):
            values = parameter.ds_tensor.detach().flatten()
            start = engine.mesh.zero_rank * values.numel()
            held = held[start : start + values.numel()]
            values = values[: held.numel()]
        if not torch.equal(values.cpu(), held):
            yield f"{name} as it is used"


def _wrong_counters(engine: Engine, state: TrainState) -> Iterator[str]:
    now = engine.engine_state()
    for key in ("adam_step", *RESTORED):
        if key in now and key in state.engine and now[key] != state.engine[key]:
            yield f"{key} is {now[key]}, {state.engine[key]} was saved"


def _wrong_settings(engine: Engine, config: TrainingRun) -> Iterator[str]:
    """Groups are the reader's own configuration's, whatever was written under."""
    expected = {config.optim.weight_decay, 0.0}
    found = set()
    for group in engine.optimizer.param_groups:
        found.add(group["weight_decay"])
        if group["lr"] != config.optim.lr:
            yield f"lr {group['lr']} of a group"
        if config.optim.name == "adamw" and (group["betas"], group["eps"]) != (config.optim.betas, config.optim.eps):
            yield f"betas {group['betas']} and eps {group['eps']} of a group"
    if not found <= expected or config.optim.weight_decay not in found:
        yield f"weight decay {sorted(found)}"


def _bytes_held(engine: Engine) -> int:
    """Of the weights and the optimizer's state that this process has, as fp32."""
    tensors = state_tensors(engine.optimizer, engine.model)
    return 4 * sum(tensor.numel() for kind in ("weights", "optimizer") for tensor in tensors[kind])
