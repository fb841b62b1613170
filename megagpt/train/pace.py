"""Is a rank slower than the others? Compared by the time that each spends by itself, not waiting for them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from megagpt.parallel.mesh import Mesh

SLOWER = 1.12
"""Times the median of the others, from which on a rank is slow: between noise and the 20% that are to be found."""
PART_OF_STEP = 0.02
"""Of a step's time, which the difference must be worth."""
WINDOWS = 4
"""Comparisons in a row in which it must be slower."""
PARTS = ("reading data", "computing")


@dataclass(frozen=True, slots=True)
class SlowRank:
    """A rank that holds the others up."""

    rank: int
    part: str
    """What it is slow at."""
    times: float
    """Its time over the median of the others."""
    seconds: float
    """Its median time a step."""


class Pace:
    """Collects each step's own times and compares those of all ranks once in a while.

    Own time is that of reading the batch, and of the forward of the first micro-batch. Ranks of one pipeline stage are
    compared with each other: stages differ by design. Where ranks wait for each other within the forward (ZeRO-3,
    tensor and sequence parallelism) they show the same time, so that a slow one among them cannot be told by it.

    Args:
        mesh: this process's place.
        every: steps between comparisons; 0: never.
    """

    def __init__(self, mesh: Mesh, every: int) -> None:
        self._mesh, self._every = mesh, every
        self._samples: list[tuple[float, float, float]] = []
        self._slow_for: dict[tuple[int, str], int] = {}
        self._named: set[int] = set()

    def note(self, data_seconds: float, forward_seconds: float, step_seconds: float) -> list[SlowRank]:
        """One step's times; the ranks to name now, each of them once. All processes call it."""
        if not self._every or self._mesh.world_size == 1:
            return []
        self._samples.append((data_seconds, forward_seconds, step_seconds))
        if len(self._samples) < self._every:
            return []
        medians = [statistics.median(column) for column in zip(*self._samples, strict=True)]
        self._samples.clear()
        return self._compare(self._mesh.gather_numbers(*medians))

    def _compare(self, medians: list[list[float]]) -> list[SlowRank]:
        """From every rank's (data, forward, step) seconds."""
        found = []
        stage_size = self._mesh.world_size // self._mesh.pipeline
        for rank, (*own, step_seconds) in enumerate(medians):
            stage = rank // stage_size * stage_size
            others = [medians[other] for other in range(stage, stage + stage_size) if other != rank]
            for index, part in enumerate(PARTS if others else ()):
                usual = statistics.median(other[index] for other in others)
                is_slow = own[index] > SLOWER * usual and own[index] - usual > PART_OF_STEP * step_seconds
                self._slow_for[rank, part] = self._slow_for.get((rank, part), 0) + 1 if is_slow else 0
                if self._slow_for[rank, part] == WINDOWS and rank not in self._named:
                    self._named.add(rank)
                    found.append(SlowRank(rank, part, own[index] / usual, own[index]))
        return found
