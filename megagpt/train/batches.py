"""Samples -> tensors on the right rank. Which samples a step holds depends on the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagpt.data.indexed import TokenFile
from megagpt.data.mixture import Mixture, sequential_windows
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.plan import BatchPlan


class TrainBatches:
    """The training samples of one process."""

    def __init__(self, mixture: Mixture, plan: BatchPlan, mesh: Mesh) -> None:
        self._mixture = mixture
        self._plan = plan
        self._rank = mesh.data_parallel_rank

    def step(self, step: int) -> list[Tensor]:
        """Micro-batches (micro_batch_size, seq_len + 1) int64 of a 0-based step."""
        return [
            torch.from_numpy(np.stack([self._mixture.sample(index) for index in indices]))
            for indices in self._plan.sample_indices(step, self._rank)
        ]


class ValidationBatches:
    """The same validation sequences at every evaluation, whatever the number of data-parallel processes.

    Every process brings equally many batches, because under ZeRO-3 each forward is a collective. Where the sequences do
    not divide, the last ones of some processes are fillers that do not count.
    """

    def __init__(self, prefix: Path, sequences: int, plan: BatchPlan, mesh: Mesh) -> None:
        self._windows = sequential_windows(TokenFile.open(prefix), plan.seq_len, sequences)
        self._own = range(mesh.data_parallel_rank, len(self._windows), mesh.data_parallel)
        self._longest_share = -(-len(self._windows) // mesh.data_parallel)
        self._micro = plan.micro_batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """((b, seq_len + 1) int64, how many of its first rows count)."""
        indices = [*self._own, *[0] * (self._longest_share - len(self._own))]
        for start in range(0, len(indices), self._micro):
            chosen = indices[start : start + self._micro]
            counted = min(len(chosen), max(0, len(self._own) - start))
            yield torch.from_numpy(np.stack([self._windows.sample(index) for index in chosen])), counted
