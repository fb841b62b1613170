"""Which process this is among all: made once at the start, then handed around as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Mesh:
    """The place of this process. Axes, slowest first: pipeline x data x sequence x tensor."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def data_parallel(self) -> int:
        """Processes along the data axis."""
        return self.world_size

    @property
    def data_parallel_rank(self) -> int:
        """Coordinate on the data axis: processes with the same one see the same samples."""
        return self.rank

    @property
    def is_main(self) -> bool:
        """True on the one process that writes shared files and talks to the terminal."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Add up each value over all processes, in double precision."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def gather(self, value: object) -> list[object]:
        """Every process's value, in rank order, on every process."""
        gathered: list[object] = [value]
        if self.world_size > 1:
            gathered = [None] * self.world_size
            torch.distributed.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()
