"""Samples -> tensors on the right rank. Which samples a step holds depends on the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagpt.data.indexed import TokenFile
from megagpt.data.mixture import Mixture, sequential_windows
from megagpt.errors import DataError
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
    """The same validation sequences at every evaluation, shared out evenly over the data-parallel processes."""

    def __init__(self, prefix: Path, sequences: int, plan: BatchPlan, mesh: Mesh) -> None:
        windows = sequential_windows(TokenFile.open(prefix), plan.seq_len, sequences)
        width = mesh.data_parallel
        even = len(windows) // width * width
        if not even:
            raise DataError(
                f"{prefix}: {len(windows)} validation sequences of {plan.seq_len} tokens "
                f"for {width} processes; give each at least one (a larger data.val, or a smaller model.max_seq_len)"
            )
        self.sequences = even
        """Sequences of one evaluation over all processes."""
        self._own = np.stack([windows.sample(i) for i in range(mesh.data_parallel_rank, even, width)])
        self._micro = plan.micro_batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._own), self._micro):
            yield torch.from_numpy(self._own[start : start + self._micro])
