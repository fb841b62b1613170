"""Which process this is among all: made once at the start, then handed around as one frozen object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megagpt.errors import MegaGPTError

T = TypeVar("T")


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

    def gather(self, value: T) -> list[T]:
        """Every process's value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def together(self, work: Callable[[], T]) -> T:
        """Let every process do its part; where one fails, all of them raise, so that none waits for another.

        Raises:
            MegaGPTError: on every process, what the first one that failed raised; an OSError in its own words.
        """
        results: list[T] = []
        failure: MegaGPTError | None = None
        try:
            results.append(work())
        except MegaGPTError as error:
            failure = error
        except OSError as error:
            failure = MegaGPTError(str(error))
        for found in self.gather(failure):
            if found is not None:
                raise found
        return results[0]

    def on_main(self, work: Callable[[], object]) -> None:
        """Let the main process alone do something to shared files; the others wait, and share its failure."""
        self.together(work if self.is_main else lambda: None)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            torch.distributed.barrier()
