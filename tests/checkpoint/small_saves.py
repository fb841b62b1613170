"""A checkpoint of a few hundred bytes, saved by one process without a process group."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.save import Identity, prune_checkpoints, save_checkpoint
from megagpt.checkpoint.saver import Saver
from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.checkpoint.tensors import KINDS, SliceReader, TensorSlice
from megagpt.config.schema import CheckpointSection
from megagpt.parallel.mesh import Mesh

ALONE = Mesh(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SHAPES = {"a.weight": (2, 3), "b.bias": (3,)}


def identity(*tokenizer_files: Path) -> Identity:
    return Identity({"model": {"family": "gpt2"}}, "data", {"kind": "gpt2"}, tokenizer_files, {"torch": "2"})


def slices(step: int, rank: int = 0, world_size: int = 1, scale: int = 1) -> list[TensorSlice]:
    """A rank's part of two tensors whose values tell the step and the kind; `scale` times as many columns."""
    found = []
    for name, shape in SHAPES.items():
        shape = (*shape[:-1], shape[-1] * scale)
        numel = torch.Size(shape).numel()
        start, stop = numel * rank // world_size, numel * (rank + 1) // world_size
        parts = {kind: values(step, kind, shape).flatten()[start:stop] for kind in KINDS}
        found.append(TensorSlice(name, shape, start, parts))
    return found


def values(step: int, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    first = 100.0 * step + 1000.0 * KINDS.index(kind)
    return first + torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def save(store: CheckpointStore, step: int, *tokenizer_files: Path, keep_last: int = 2) -> None:
    """As a training run saves."""
    save_checkpoint(store, ALONE, slices(step), {"step": step}, identity(*tokenizer_files))
    prune_checkpoints(store, ALONE, keep_last, 0)


@dataclass
class Told:
    """What a saver said."""

    lines: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """What went wrong."""
    saved: list[int] = field(default_factory=list)
    """Steps of the saves that did not."""

    def say(self, message: str) -> None:
        self.lines.append(message)

    def event(self, name: str, step: int, **details: Any) -> None:
        if name == "saved":
            self.saved.append(step)
            return
        self.events.append({"event": name, "step": step, **details})

    def make_durable(self) -> None:
        """It records nothing on a disk."""


class State:
    """What a saver reads: set the step, and it finds that step's values."""

    def __init__(self, step: int = 0, mesh: Mesh = ALONE, scale: int = 1) -> None:
        self.mesh, self.scale = mesh, scale
        self._slices = slices(step, mesh.rank, mesh.world_size, scale)

    def set(self, step: int) -> None:
        """As the optimizer does it: in place."""
        for held, new in zip(self._slices, slices(step, self.mesh.rank, self.mesh.world_size, self.scale), strict=True):
            for kind in KINDS:
                held.values[kind].copy_(new.values[kind])

    def __call__(self) -> list[TensorSlice]:
        return self._slices


def saver(store: CheckpointStore, state: State, told: Told, *tokenizer_files: Path, **settings: Any) -> Saver:
    section = CheckpointSection(**{"keep_last": 2, "save_every": 10, "retry_after": 3, **settings})
    return Saver(store, state.mesh, section, identity(*tokenizer_files), state, told)


def save_by(kind: str, store: CheckpointStore, step: int, *tokenizer_files: Path) -> Told:
    """One save as a run makes it, waited for; `kind` is sync or async. A failed one is told, not raised."""
    state, told = State(step), Told()
    with saver(store, state, told, *tokenizer_files, asynchronous=kind == "async", make_room=False) as by:
        by.save({"step": step})
        state.set(step + 50)
    return told


def check_whole(store: CheckpointStore, scale: int = 1) -> list[int]:
    """Every checkpoint that the store shows is complete and holds its own step's values; their steps."""
    for step in store.steps():
        manifest = verify_checkpoint(store.step_dir(step))
        assert manifest.step == step
        with SliceReader(rank_files(store.step_dir(step), manifest)) as reader:
            for name, shape in SHAPES.items():
                shape = (*shape[:-1], shape[-1] * scale)
                for kind in KINDS:
                    assert torch.equal(reader.read_whole(name, kind), values(step, kind, shape))
    return store.steps()
