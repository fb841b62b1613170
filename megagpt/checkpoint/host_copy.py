"""A copy of a rank's slices in host memory, from which a file is written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from megagpt.checkpoint.tensors import RankFile, TensorSlice, slices_header
from megagpt.errors import CheckpointError

SEGMENT_NUMEL = 2**24
"""fp32 values of one piece of the memory, 64 MiB. torch rounds page-locked memory up to a power of two: one piece of
all could take twice as much."""


class HostCopy:
    """Host memory that every save uses again: as much as this rank's values take.

    Args:
        device: where the slices are. From a CUDA device they are copied into page-locked memory, all of them in flight
            at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._segments: list[Tensor] = []
        self._index, self._offset = 0, 0
        """The first element that is free: of which segment, and where in it."""

    @property
    def n_bytes(self) -> int:
        """Memory that is held."""
        return 4 * sum(segment.numel() for segment in self._segments)

    def reserve(self, slices: Iterable[TensorSlice]) -> None:
        """Have the memory for such slices, so that too little of it is told at the start and not at the first save.

        Raises:
            CheckpointError: there is too little.
        """
        numel = sum(values.numel() for part in slices for values in part.values.values())
        left = numel - self.n_bytes // 4
        try:
            while left > 0:
                self._segments.append(self._segment(min(SEGMENT_NUMEL, left)))
                left -= SEGMENT_NUMEL
        except (MemoryError, RuntimeError) as error:  # torch tells a lack of memory as RuntimeError
            raise CheckpointError(
                f"checkpoint.asynchronous: no host memory for a copy of this process's {4 * numel / 1e9:.3g} GB of "
                f"weights and optimizer state; set checkpoint.asynchronous=false ({error})"
            ) from None

    def take(self, slices: Iterable[TensorSlice]) -> RankFile:
        """Copy the slices; the file is good until the next `take`.

        Returns when all values are here: they may change from then on.
        """
        self._index, self._offset = 0, 0
        parts = []
        for part in slices:  # one at a time: those that live on disk are in memory only while they are copied
            for values in part.values.values():
                self._append(values.detach())
            parts.append(replace(part, values={kind: held.to("meta") for kind, held in part.values.items()}))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        filled = self._segments[: self._index]
        if self._offset:
            filled.append(self._segments[self._index][: self._offset])
        return RankFile(slices_header(parts), filled)

    def _append(self, values: Tensor) -> None:
        done, numel = 0, values.numel()
        while done < numel:
            if self._index == len(self._segments):
                self._segments.append(self._segment(min(SEGMENT_NUMEL, numel - done)))
            segment = self._segments[self._index]
            fits = min(segment.numel() - self._offset, numel - done)
            place = segment[self._offset : self._offset + fits]
            place.copy_(values[done : done + fits], non_blocking=True)
            done, self._offset = done + fits, self._offset + fits
            if self._offset == segment.numel():
                self._index, self._offset = self._index + 1, 0

    def _segment(self, numel: int) -> Tensor:
        segment = torch.empty(numel, dtype=torch.float32, pin_memory=self._device.type == "cuda")
        return segment.zero_()  # the system gives memory when it is first touched, which takes longer than a copy
