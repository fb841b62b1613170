"""Index arithmetic between differently cut copies of one tensor: which elements of the one are which of the other.

Copies that are cut along the same dimension share rectangles: as many runs of neighbouring elements as there are
indices before that dimension, at equal distances in either copy. So what they share is moved run by run by one strided
copy, and nothing else is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from megagpt.model.layout import Shard


@dataclass(frozen=True, slots=True)
class Spans:
    """The stretches of a logical tensor, along one dimension, that a process holds one after the other.

    The logical tensor is seen as (outer, `size`, inner); what is held of it is (outer, held, inner). Elements are
    counted in the flattened form of either.
    """

    size: int
    inner: int
    outer: int
    spans: tuple[tuple[int, int], ...]
    """(start, size) of each stretch."""

    @classmethod
    def of(cls, shape: tuple[int, ...], shard: Shard | None) -> Self:
        """What a shard holds, without its padding; everything where there is none, or it is not cut."""
        if shard is None or not shard.is_cut:
            numel = math.prod(shape)
            return cls(numel, 1, 1, ((0, numel),))
        return cls._cut(shape, shard.layout.dim, shard.spans)

    @classmethod
    def from_description(cls, shape: tuple[int, ...], described: dict[str, Any] | None) -> Self:
        """From the metadata of a checkpoint's file; None is the whole tensor."""
        if described is None:
            return cls.of(shape, None)
        return cls._cut(shape, described["dim"], tuple((start, size) for start, size in described["spans"]))

    @classmethod
    def _cut(cls, shape: tuple[int, ...], dim: int, spans: tuple[tuple[int, int], ...]) -> Self:
        return cls(shape[dim], math.prod(shape[dim + 1 :]), math.prod(shape[:dim]), spans)

    @property
    def held(self) -> int:
        """Length of what is held along the dimension that is cut."""
        return sum(size for _, size in self.spans)

    @property
    def numel(self) -> int:
        """Elements that are held."""
        return self.outer * self.held * self.inner

    @property
    def is_whole(self) -> bool:
        """Nothing is missing, and places are the same in both."""
        return self.spans == ((0, self.size),)

    def is_comparable(self, other: Spans) -> bool:
        """The two are cut along the same dimension, or one of them is not cut."""
        same = (self.size, self.inner, self.outer) == (other.size, other.inner, other.outer)
        return same or self.is_whole or other.is_whole

    def seen_as(self, other: Spans) -> Spans:
        """What is whole, in the dimensions of another way to hold the tensor."""
        return Spans(other.size, other.inner, other.outer, ((0, other.size),)) if self.is_whole else self


@dataclass(frozen=True, slots=True)
class Runs:
    """`count` runs of `length` neighbouring elements, whose first elements are `step` apart."""

    first: int
    step: int
    length: int
    count: int

    @property
    def numel(self) -> int:
        """Elements of all of them."""
        return self.length * self.count

    def of(self, values: Tensor, start: int) -> Tensor:
        """(count, length) view of these runs in a 1-D tensor whose first element is counted as `start`."""
        begin = self.first - start
        return values[begin : begin + (self.count - 1) * self.step + self.length].unfold(0, self.length, self.step)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements that two copies of a tensor have in common: where they are in either."""

    held: Runs
    wanted: Runs

    def within(self, held: range, wanted: range) -> Iterator[Stretch]:
        """The same, without what lies outside of a range of one copy or the other."""
        length = self.held.length
        pairs = ((self.held, held), (self.wanted, wanted))
        # Runs from `low` to `high` reach into both ranges; those from `whole_low` to `whole_high` lie in both wholly.
        low = max(0, *((span.start - length - runs.first) // runs.step + 1 for runs, span in pairs))
        high = min(self.held.count, *((span.stop - 1 - runs.first) // runs.step + 1 for runs, span in pairs))
        whole_low = max(low, *(-((runs.first - span.start) // runs.step) for runs, span in pairs))
        whole_high = min(high, *((span.stop - length - runs.first) // runs.step + 1 for runs, span in pairs))
        if whole_low < whole_high:
            yield self._part(whole_low, whole_high - whole_low, 0, length)
        else:
            whole_low = whole_high = high  # every run is cut off somewhere
        for index in (*range(low, whole_low), *range(whole_high, high)):
            firsts = [(runs.first + index * runs.step, span) for runs, span in pairs]
            skipped = max(0, *(span.start - first for first, span in firsts))
            kept = min(length, *(span.stop - first for first, span in firsts)) - skipped
            if kept > 0:
                yield self._part(index, 1, skipped, kept)

    def _part(self, index: int, count: int, skipped: int, length: int) -> Stretch:
        return Stretch(
            *(
                Runs(runs.first + index * runs.step + skipped, runs.step, length, count)
                for runs in (self.held, self.wanted)
            )
        )


def stretches(held: Spans, held_range: range, wanted: Spans, wanted_range: range) -> Iterator[Stretch]:
    """What is in both of two comparable copies of a tensor.

    Args:
        held: how the one is cut.
        held_range: the elements of it that are there.
        wanted: how the other is cut.
        wanted_range: the elements of it that are looked for.
    """
    held = held.seen_as(wanted)
    wanted = wanted.seen_as(held)
    held_before = 0
    for held_start, held_size in held.spans:
        wanted_before = 0
        for wanted_start, wanted_size in wanted.spans:
            start = max(held_start, wanted_start)
            stop = min(held_start + held_size, wanted_start + wanted_size)
            if start < stop and held.inner > 0:
                length = (stop - start) * held.inner
                shared = Stretch(
                    _runs(held, held_before + start - held_start, length),
                    _runs(wanted, wanted_before + start - wanted_start, length),
                )
                yield from shared.within(held_range, wanted_range)
            wanted_before += wanted_size
        held_before += held_size


def _runs(spans: Spans, place: int, length: int) -> Runs:
    """The runs that begin at a place along the dimension that is cut."""
    return Runs(place * spans.inner, spans.held * spans.inner, length, spans.outer)
