"""What DeepSpeed's own checkpoints hold, tensor by tensor: those of ZeRO-0 (fp32) to 3, and universal ones.

They are pickles, and a pickle can run any code when it is read. So they are read without running any: PyTorch's
restricted unpickler makes tensors and plain values, and for the few classes of DeepSpeed's that stand in every such
file it makes objects that only hold attributes. What holds more than that is read from a trusted folder alone.
Nothing of DeepSpeed is needed. Files are mapped into memory, and read where a tensor is looked at.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.tensors import MOMENTS, WEIGHT
from megagpt.errors import CheckpointError

UNIVERSAL = "zero"
"""Folder of a universal checkpoint that holds a folder for each parameter."""
POINTERS = ("latest", "latest_universal")
"""Files of a run's folder that name its newest checkpoint."""
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)(?:_\d+)?_optim_states\.pt")
_FILE_OF = {WEIGHT: "fp32.pt"} | {kind: f"{kind}.pt" for kind in MOMENTS}


class StandIn:
    """An object of one of DeepSpeed's classes: its attributes, and nothing that could be run."""


_ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}


def _zero_stage(owner: object, name: object) -> int:
    """In place of `getattr`, by which Pythons such as 3.11.2 write an enumeration's member: of this one alone."""
    if owner is not int or not isinstance(name, str) or name not in _ZERO_STAGES:
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return _ZERO_STAGES[name]


_KNOWN_CLASSES: list[Any] = [
    *(
        (StandIn, f"deepspeed.{name}")
        for name in (
            "checkpoint.universal_checkpoint.SubparamShape",
            "runtime.fp16.loss_scaler.DynamicLossScaler",
            "runtime.fp16.loss_scaler.LossScaler",
            "utils.tensor_fragment.fragment_address",
        )
    ),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_zero_stage, "builtins.getattr"),
]


@dataclass(frozen=True, slots=True)
class Counters:
    """Where the run stood."""

    steps: int
    """Optimizer steps, the skipped ones among them."""
    skipped_steps: int
    samples: int
    updates: int
    """Adam's step count."""
    loss_scaler: Mapping[str, float] = field(default_factory=dict)
    """fp16 with a dynamic loss scale: as `Engine.engine_state` names it."""
    deepspeed_version: str = "unknown"


@dataclass(frozen=True, slots=True)
class DeepSpeedFiles:
    """One checkpoint."""

    folder: Path
    counters: Counters
    shapes: Mapping[str, tuple[int, ...]]
    """Of every parameter, under the name that it has there."""
    pieces: Callable[[str, str], list[Tensor]]
    """(name, kind) -> the values in order, in pieces; none where nothing is kept."""

    def read(self, name: str, kind: str) -> Tensor:
        """A parameter's weight or one of its moments, fp32. Before the first update moments are zero.

        Raises:
            CheckpointError: it is missing, or not of the parameter's size.
        """
        shape = self.shapes[name]
        pieces = self.pieces(name, kind)
        if not pieces and kind != WEIGHT and self.counters.updates == 0:
            return torch.zeros(shape)
        if not all(isinstance(piece, Tensor) for piece in pieces):
            raise CheckpointError(f"{self.folder}: {name}: what is kept as '{kind}' is no tensor")
        found = sum(piece.numel() for piece in pieces)
        if not pieces or found != math.prod(shape):
            why = "" if pieces else "; a file is missing, or the optimizer was not Adam"
            raise CheckpointError(
                f"{self.folder}: {name}: {found} of {math.prod(shape)} values of '{kind}' are there{why}"
            )
        return torch.cat([piece.reshape(-1).float() for piece in pieces]).view(shape)


def open_deepspeed(folder: Path, *, trusted: bool = False) -> DeepSpeedFiles:
    """Open a checkpoint.

    Args:
        folder: of one checkpoint (DeepSpeed's tag), or the folder above it with `latest`.
        trusted: let pickles run code.

    Raises:
        CheckpointError: there is none, files are missing or damaged, it is of a kind that is not read, or it holds
            what only a trusted folder may.
    """
    folder = _checkpoint_folder(folder)
    try:
        reader = _universal if (folder / UNIVERSAL).is_dir() else _native_reader(folder)
        return reader(folder, trusted=trusted)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: {error}); "
            "save it again with that version"
        ) from error


def _checkpoint_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name the folder that DeepSpeed's save_checkpoint wrote")
    if (folder / UNIVERSAL).is_dir() or any(folder.glob("*_states.pt")):
        return folder
    for pointer in POINTERS:
        if (folder / pointer).is_file():
            tag = (folder / pointer).read_text(encoding="utf-8", errors="replace").strip()
            if Path(tag).name != tag or tag in ("", "..") or not (folder / tag).is_dir():
                raise CheckpointError(f"{folder / pointer}: names {tag!r}, which is no folder beside it")
            return folder / tag
    raise CheckpointError(f"{folder}: holds no *_optim_states.pt, no folder '{UNIVERSAL}' and no file 'latest'")


def _native_reader(folder: Path) -> Callable[..., DeepSpeedFiles]:
    """For what one process writes alone under ZeRO-0, or each of several under ZeRO-1 to 3."""
    matches = [match for path in folder.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))]
    is_parallel = any(int(match[2]) for match in matches) or any(
        any(folder.glob(files)) for files in ("layer_*model_states.pt", "mp_rank_*[1-9]_model_states.pt")
    )
    if is_parallel and matches:
        raise CheckpointError(
            f"{folder}: written with tensor or pipeline parallelism; make a universal checkpoint of it first "
            "(python -m deepspeed.checkpoint.ds_to_universal --input_folder ... --output_folder ...) and import that"
        )
    if is_parallel:
        raise CheckpointError(
            f"{folder}: written with tensor or pipeline parallelism and without ZeRO, which DeepSpeed cannot make "
            "universal; load it there with zero_optimization.stage 1, save, and import a universal checkpoint of that "
            "(python -m deepspeed.checkpoint.ds_to_universal)"
        )
    return _native if matches else _unsharded


def _optimizer_files(folder: Path) -> list[Path]:
    """One a data-parallel rank, in order."""
    matches = [(match, path) for path in folder.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))]
    by_rank = {int(match[1]): path for match, path in matches}
    missing = sorted(set(range(max(by_rank) + 1)) - by_rank.keys())
    if missing or len(by_rank) != len(matches):
        problem = f"ranks {missing} are missing" if missing else "several saves in one folder"
        raise CheckpointError(f"{folder}: zero_pp_rank_*_optim_states.pt: {problem}")
    return [by_rank[rank] for rank in sorted(by_rank)]


@contextmanager
def _known_classes_alone() -> Iterator[None]:
    """Inside, no other class may be unpickled: libraries add theirs to PyTorch's list, such as argparse.Namespace."""
    others = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_KNOWN_CLASSES):
            yield
    finally:
        torch.serialization.add_safe_globals(others)


def _load(path: Path, *, trusted: bool) -> Any:
    try:
        if trusted:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        with _known_classes_alone():
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        held = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path}: holds {held[1] if held else 'something'} besides tensors and plain values, and reading that can "
            "run any code; if you trust whoever wrote this folder, name it again with --trust"
        ) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is not complete") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None


@dataclass(frozen=True, slots=True)
class _Fragment:
    """A stretch of a parameter in the flat tensors of one rank."""

    rank: int
    group: int
    start: int
    numel: int


def _native(folder: Path, *, trusted: bool) -> DeepSpeedFiles:
    """What ZeRO's optimizers write: each rank a flat fp32 tensor for each group of parameters, and Adam's of it."""
    states = [_load(file, trusted=trusted)["optimizer_state_dict"] for file in _optimizer_files(folder)]
    is_zero3 = "fp32_flat_groups" in states[0]
    weights_key, adam_key = _ZERO3_KEYS if is_zero3 else _ZERO12_KEYS
    model = _load(folder / (_ZERO3_MODEL if is_zero3 else _MODEL), trusted=trusted)
    _check_native(folder, states, model)
    groups = [{name: tuple(shape) for name, shape in group.items()} for group in model["param_shapes"]]
    fragments = _even_fragments(groups, len(states)) if is_zero3 else _mapped_fragments(states)

    def pieces(name: str, kind: str) -> list[Tensor]:
        found = []
        for at in fragments.get(name, ()):
            state = states[at.rank]
            flat = (
                state[weights_key][at.group] if kind == WEIGHT else state[adam_key]["state"].get(at.group, {}).get(kind)
            )
            if flat is not None:
                found.append(flat[at.start : at.start + at.numel])
        return found

    steps = [_step_of(kept) for state in states for kept in state[adam_key]["state"].values()]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    return DeepSpeedFiles(folder, _counters(folder, model, steps, states[0].get("loss_scaler")), shapes, pieces)


_ZERO12_KEYS = ("single_partition_of_fp32_groups", "base_optimizer_state")
_ZERO3_KEYS = ("fp32_flat_groups", "optimizer_state_dict")
_MODEL = "mp_rank_00_model_states.pt"
_ZERO3_MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def _check_native(folder: Path, states: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> None:
    count = states[0]["partition_count"]
    written_by = max(count) if isinstance(count, list | tuple) else int(count)
    if written_by != len(states):
        raise CheckpointError(f"{folder}: {len(states)} of {written_by} files *_optim_states.pt are there")
    if isinstance(states[0].get("base_optimizer_state"), list):
        raise CheckpointError(f"{folder}: an elastic checkpoint; save with zero_optimization.elastic_checkpoint false")
    if model.get("frozen_param_shapes"):
        frozen = next(iter(model["frozen_param_shapes"]))
        raise CheckpointError(f"{folder}: {frozen} was frozen, so that it has no optimizer state to go on with")


def _unsharded(folder: Path, *, trusted: bool) -> DeepSpeedFiles:
    """ZeRO-0 in fp32: one file with the module's tensors and the torch optimizer's own state."""
    model = _load(folder / _MODEL, trusted=trusted)
    optimizer = model["optimizer"]
    if not isinstance(optimizer, dict) or not {"state", "param_groups"} <= optimizer.keys():
        raise CheckpointError(
            f"{folder / _MODEL}: no zero_pp_rank_*_optim_states.pt is beside it, and it holds no optimizer state of "
            "fp32 training; of ZeRO-0 only that is read: save under ZeRO-1"
        )
    weights = _own_parameters(model)
    for name, weight in weights.items():
        if weight.dtype != torch.float32:
            raise CheckpointError(f"{folder / _MODEL}: {name} is {weight.dtype}, not torch.float32: save under ZeRO-1")
    moments = _moments_by_name(folder / _MODEL, weights, optimizer)

    def pieces(name: str, kind: str) -> list[Tensor]:
        found = weights[name] if kind == WEIGHT else moments.get(name, {}).get(kind)
        return [] if found is None else [found]

    steps = [_step_of(kept) for kept in optimizer["state"].values()]
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return DeepSpeedFiles(folder, _counters(folder, model, steps, None), shapes, pieces)


def _own_parameters(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """In the module's order; one that is tied to another has the other's place in the file, and is left out."""
    found: dict[tuple[int, int, tuple[int, ...]], tuple[str, Tensor]] = {}
    for name, tensor in model["module"].items():
        if name not in (model.get("buffer_names") or ()):
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
            found.setdefault(place, (name, tensor))
    return dict(found.values())


def _moments_by_name(
    path: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The optimizer numbers its parameters, group by group; a group has them in the module's order.

    Raises:
        CheckpointError: the shapes say otherwise, or do not say which group a parameter is of.
    """
    state, found = optimizer["state"], {}
    if not state:
        return {}
    left = [[state[number] for number in group["params"]] for group in optimizer["param_groups"]]
    if sum(map(len, left)) != len(weights):
        raise CheckpointError(
            f"{path}: {len(weights)} parameters, and optimizer state of {sum(map(len, left))}; it must be of all "
            "of them"
        )
    for name, weight in weights.items():
        fitting = [group for group in left if group and group[0][MOMENTS[0]].shape == weight.shape]
        if len(fitting) != 1:
            raise CheckpointError(
                f"{path}: which moments are those of {name} cannot be told: they have numbers in place of names, and "
                f"{len(fitting)} of {len(left)} groups come with its shape next; save under ZeRO-1"
            )
        found[name] = fitting[0].pop(0)
    return found


def _mapped_fragments(states: Sequence[Mapping[str, Any]]) -> dict[str, list[_Fragment]]:
    """ZeRO-1 and 2 write down what lies where; the ranks hold a parameter's stretches in their order."""
    found: dict[str, list[_Fragment]] = {}
    for rank, state in enumerate(states):
        for group, mapping in enumerate(state["param_slice_mappings"]):
            for name, at in mapping.items():
                found.setdefault(name, []).append(_Fragment(rank, group, int(at.start), int(at.numel)))
    return found


def _even_fragments(groups: Sequence[Mapping[str, tuple[int, ...]]], n_ranks: int) -> dict[str, list[_Fragment]]:
    """ZeRO-3 cuts every parameter evenly, and lays a rank's parts of a group end to end; the last parts are padded."""
    found: dict[str, list[_Fragment]] = {}
    for group, shapes in enumerate(groups):
        before = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            part = -(-numel // n_ranks)
            held = [max(0, min(part, numel - rank * part)) for rank in range(n_ranks)]
            found[name] = [_Fragment(rank, group, before, size) for rank, size in enumerate(held)]
            before += part
    return found


def _universal(folder: Path, *, trusted: bool) -> DeepSpeedFiles:
    """A folder for each parameter, with a file for each of its values; names that hold no state are copies."""
    models = sorted(folder.glob("*mp_rank_*_model_states.pt"))
    if not models:
        raise CheckpointError(f"{folder}: no mp_rank_00_model_states.pt; the checkpoint is not complete")
    model = _load(models[0], trusted=trusted)
    left_out = {*(model.get("shared_params") or ()), *(model.get("buffer_names") or ())}
    listed = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    folders = {
        path.name: path for path in (folder / UNIVERSAL).iterdir() if path.is_dir() and path.name not in left_out
    }

    def value(name: str, kind: str) -> Tensor | None:
        path = folders[name] / _FILE_OF[kind]
        if not path.is_file():
            return None
        held = _load(path, trusted=trusted)
        found: Tensor = held["param"] if isinstance(held, dict) else held
        return found

    def pieces(name: str, kind: str) -> list[Tensor]:
        found = value(name, kind)
        return [] if found is None else [found]

    shapes = {}
    for name in sorted(folders):
        weight = value(name, WEIGHT)
        if weight is None:
            raise CheckpointError(f"{folders[name]}: no {_FILE_OF[WEIGHT]}; the checkpoint is not complete")
        own = tuple(weight.shape)
        is_flat = name in listed and own == (math.prod(listed[name]),)  # as ZeRO-3's are
        shapes[name] = listed[name] if is_flat else own
    common = folder / UNIVERSAL / "optimizer_state.pt"
    optimizer = _load(common, trusted=trusted) if common.is_file() else {}
    step_files = [path / "step.pt" for path in folders.values() if (path / "step.pt").is_file()]
    steps = [int(_load(path, trusted=trusted)) for path in step_files]
    steps += [_step_of(kept) for kept in optimizer.get("optimizer_state_dict", {}).get("state", {}).values()]
    return DeepSpeedFiles(folder, _counters(folder, model, steps, optimizer.get("loss_scaler")), shapes, pieces)


def _step_of(kept: Mapping[str, Any]) -> int:
    return int(kept.get("step", 0))


def _counters(folder: Path, model: Mapping[str, Any], steps: Sequence[int], scaler: Any) -> Counters:
    if len(set(steps)) > 1:
        raise CheckpointError(f"{folder}: parameters of {min(steps)} and of {max(steps)} updates: several saves in one")
    updates = steps[0] if steps else 0
    done = int(model["global_steps"]) - int(model["skipped_steps"])
    if done and not updates:
        raise CheckpointError(f"{folder}: {done} updates were made and no optimizer state is there; it cannot go on")
    scale: dict[str, float] = {}
    if getattr(scaler, "dynamic", False):
        scale = {
            "loss_scale": float(scaler.cur_scale),
            "scaler_iter": int(scaler.cur_iter),
            "last_overflow_iter": int(scaler.last_overflow_iter),
            "hysteresis": int(scaler.cur_hysteresis),
        }
    return Counters(
        steps=int(model["global_steps"]),
        skipped_steps=int(model["skipped_steps"]),
        samples=int(model["global_samples"]),
        updates=updates,
        loss_scaler=scale,
        deepspeed_version=str(model.get("ds_version", "unknown")),
    )
