"""A checkpoint of a few hundred bytes, saved by one process without a process group."""

from __future__ import annotations

from pathlib import Path

import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.save import Identity, prune_checkpoints, save_checkpoint
from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.checkpoint.tensors import KINDS, SliceReader, TensorSlice
from megagpt.parallel.mesh import Mesh

ALONE = Mesh(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def identity(*tokenizer_files: Path) -> Identity:
    return Identity({"model": {"family": "gpt2"}}, "data", {"kind": "gpt2"}, tokenizer_files, {"torch": "2"})


def slices(step: int) -> list[TensorSlice]:
    """Two tensors whose values tell the step and the kind."""
    return [
        TensorSlice(name, shape, 0, {kind: values(step, kind, shape).flatten() for kind in KINDS})
        for name, shape in (("a.weight", (2, 3)), ("b.bias", (3,)))
    ]


def values(step: int, kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    first = 100.0 * step + 1000.0 * KINDS.index(kind)
    return first + torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def save(store: CheckpointStore, step: int, *tokenizer_files: Path, keep_last: int = 2) -> None:
    """As a training run saves."""
    save_checkpoint(store, ALONE, slices(step), {"step": step}, identity(*tokenizer_files))
    prune_checkpoints(store, ALONE, keep_last, 0)


def check_whole(store: CheckpointStore) -> list[int]:
    """Every checkpoint that the store shows is complete and holds its own step's values; their steps."""
    for step in store.steps():
        manifest = verify_checkpoint(store.step_dir(step))
        assert manifest.step == step
        with SliceReader(rank_files(store.step_dir(step), manifest)) as reader:
            for kind in KINDS:
                assert torch.equal(reader.read_whole("a.weight", kind), values(step, kind, (2, 3)))
    return store.steps()
