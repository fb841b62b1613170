"""Samples -> tensors on the right rank. Which samples a step holds depends on the step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from megagpt.data.indexed import TokenFile
from megagpt.data.mixture import EvenWindows, Mixture, sequential_windows
from megagpt.model.batch import TokenBatch
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.plan import BatchPlan


class TrainBatches:
    """The training samples of one process."""

    def __init__(self, mixture: Mixture, plan: BatchPlan, mesh: Mesh) -> None:
        self._mixture = mixture
        self._plan = plan
        self._rank = mesh.data_parallel_rank

    def step(self, step: int) -> list[TokenBatch]:
        """The micro-batches of a 0-based step, each of micro_batch_size x seq_len tokens."""
        return [
            _batch(self._mixture, indices, isolate_documents=self._plan.isolate_documents)
            for indices in self._plan.sample_indices(step, self._rank)
        ]


class ValidationBatches:
    """The same validation sequences at every evaluation, whatever the number of data-parallel processes.

    Every process brings equally many batches of the same shape, because a forward can be a collective. Where the
    sequences do not divide, the last rows of some processes are fillers that do not count.
    """

    def __init__(self, prefix: Path, sequences: int, plan: BatchPlan, mesh: Mesh) -> None:
        self._isolate = plan.isolate_documents
        self._windows = sequential_windows(TokenFile.open(prefix), plan.seq_len, sequences)
        self._own = range(mesh.data_parallel_rank, len(self._windows), mesh.data_parallel)
        longest_share = -(-len(self._windows) // mesh.data_parallel)
        self._micro = min(plan.micro_batch_size, longest_share)
        self._n_batches = -(-longest_share // self._micro)

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[TokenBatch]:
        """Batches of the same shape (b, seq_len)."""
        for start in range(0, self._n_batches * self._micro, self._micro):
            counted = self._own[start : start + self._micro]
            chosen = [*counted, *[0] * (self._micro - len(counted))]
            yield _batch(self._windows, chosen, isolate_documents=self._isolate, counted=len(counted))


def _batch(
    samples: Mixture | EvenWindows, indices: Sequence[int], *, isolate_documents: bool, counted: int | None = None
) -> TokenBatch:
    windows = torch.from_numpy(np.stack([samples.sample(index) for index in indices]))
    if not isolate_documents:
        return TokenBatch.of_windows(windows, counted=counted)
    documents = torch.from_numpy(np.stack([samples.documents(index) for index in indices]))
    return TokenBatch.of_windows(windows, documents, counted=counted)
