"""Who answers what, where several processes evaluate together.

Every process runs the whole evaluation on the same requests, in the same order; only the work on the model is shared
out, and the answers go to all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from megagpt.errors import EvalError, MegaGPTError
from megagpt.parallel.mesh import Mesh

ROUND = 4
"""Units of each data coordinate between two exchanges of answers: how often the processes wait for each other."""
UNITS = 8
"""Parts that a data coordinate's share of a list is cut into, where they are long enough."""
LEAST_UNIT = 64
"""Requests that a part should have."""

T = TypeVar("T")
Unit = TypeVar("Unit")
Answer = TypeVar("Answer")


class Sharing:
    """This process's part of an evaluation.

    Processes that differ in their place on the data (and sequence) axis take different units of work. Those that share
    a model, the tensor and pipeline peers of one data coordinate, make the same calls.

    Args:
        mesh: None for a process alone.
        settle: called when this process has no unit left before the next exchange: a model whose every forward is a
            collective over all processes (`megagpt.engine.live`) takes part in the others' there.
        on_round: told that an exchange is done, with its number from 1.
    """

    def __init__(
        self,
        mesh: Mesh | None = None,
        *,
        settle: Callable[[], None] = lambda: None,
        on_round: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._mesh = mesh
        self._settle = settle
        self._on_round = on_round
        self._rounds = 0

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks to the terminal."""
        return self._mesh is None or self._mesh.is_main

    @property
    def keeps_answers(self) -> bool:
        """True on one of the processes that share a model: its peers have the same answers."""
        return self._mesh is None or (self._mesh.tensor_rank == 0 and self._mesh.pipeline_rank == 0)

    @property
    def device(self) -> torch.device | None:
        """Where this process computes; None for a process alone, which the user tells."""
        return None if self._mesh is None else self._mesh.device

    @property
    def writer(self) -> str:
        """A name for files of this process alone."""
        return "0" if self._mesh is None else str(self._mesh.rank)

    @property
    def layout(self) -> str:
        """How many share the work, and how many the model."""
        mesh = self._mesh
        return "1 x 1 x 1" if mesh is None else f"{mesh.zero_parallel} x {mesh.pipeline} x {mesh.tensor}"

    def n_parts(self, n: int) -> int:
        """Units to cut a list of `n` requests into; 1 for a process alone."""
        if self._mesh is None or self._mesh.zero_parallel == 1:
            return 1
        return self._mesh.zero_parallel * max(1, min(UNITS, n // (LEAST_UNIT * self._mesh.zero_parallel)))

    def map(self, units: Sequence[Unit], work: Callable[[Unit], Answer]) -> Iterator[tuple[int, Answer]]:
        """Every unit's number and answer, on every process, in the same order on all; a round at a time.

        Args:
            units: the same on all processes; neighbours should cost alike.
            work: answers one. The peers of a data coordinate call it for the same units in the same order. An
                `EvalError` or its like must come on all of them; any other exception ends this process at once, and
                the watch then ends the others.

        Raises:
            MegaGPTError: on every process, what the first one that failed raised.
        """
        mesh = self._mesh
        if mesh is None or mesh.world_size == 1:
            yield from ((number, work(unit)) for number, unit in enumerate(units))
            return
        stride = ROUND * mesh.zero_parallel
        for start in range(0, len(units), stride):
            own = range(start + mesh.zero_rank, min(start + stride, len(units)), mesh.zero_parallel)
            answers, error = self._answered(units, own, work)
            self._settle()
            everything: dict[int, Answer] = {}
            for theirs, failure in mesh.gather((answers if self.keeps_answers else {}, error)):
                if failure is not None:
                    raise failure
                everything |= theirs
            self._rounds += 1
            self._on_round(self._rounds)
            yield from sorted(everything.items())

    def _answered(
        self, units: Sequence[Unit], own: Iterable[int], work: Callable[[Unit], Answer]
    ) -> tuple[dict[int, Answer], MegaGPTError | None]:
        answers: dict[int, Answer] = {}
        try:
            for number in own:
                answers[number] = work(units[number])
        except MegaGPTError as error:
            return {}, error
        return answers, None

    def check_same(self, what: str, values: Iterable[object]) -> None:
        """See that every process has the same values; their `repr` is compared.

        Raises:
            EvalError: on every process, naming the ones that differ.
        """
        if self._mesh is None or self._mesh.world_size == 1:
            return
        digest = hashlib.sha256()
        for value in values:
            digest.update(repr(value).encode() + b"\0")
        found = self._mesh.gather(digest.hexdigest())
        others = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
        if others:
            raise EvalError(
                f"{what} of rank {', '.join(map(str, others))} are not those of rank 0: the ranks' benchmark data, "
                "tokenizers or versions of lm-eval differ; `megagpt eval doctor` on each host tells about the data"
            )

    def from_main(self, work: Callable[[], T]) -> T:
        """What the main process finds out, on every process; its failure too."""
        mesh = self._mesh
        if mesh is None:
            return work()
        found = mesh.together(lambda: [work()] if mesh.is_main else [])
        return mesh.gather(found)[0][0]

    def all(self, flag: bool) -> bool:  # noqa: FBT001 - as the builtin
        """Whether it is true on every process."""
        return flag if self._mesh is None else all(self._mesh.gather(flag))

    def first_on_each_host(self, work: Callable[[], T]) -> T:
        """Let one process of each host prepare what all of them then find in the host's files.

        Raises:
            MegaGPTError: on every process, what the first one that failed raised.
        """
        mesh = self._mesh
        if mesh is None or mesh.world_size == 1:
            return work()
        results: list[T] = []

        def do() -> None:
            results.append(work())

        mesh.together(do if mesh.local_rank == 0 else lambda: None)
        mesh.together(do if mesh.local_rank != 0 else lambda: None)
        return results[0]
