"""Index arithmetic between differently cut copies of one tensor: which element of the one is which of the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
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

    def to_logical(self, local: Tensor) -> Tensor:
        """Places in what is held -> places in the logical tensor."""
        if self.is_whole:
            return local
        table = torch.cat([torch.arange(start, start + size) for start, size in self.spans])
        return self._moved(local, self.held, self.size, table)

    def to_local(self, logical: Tensor) -> Tensor:
        """Places in the logical tensor -> places in what is held, -1 where it is not."""
        if self.is_whole:
            return logical
        table = torch.full((self.size,), -1)
        before = 0
        for start, size in self.spans:
            table[start : start + size] = torch.arange(before, before + size)
            before += size
        return self._moved(logical, self.size, self.held, table)

    def _moved(self, places: Tensor, before: int, after: int, table: Tensor) -> Tensor:
        """From (outer, `before`, inner) to (outer, `after`, inner), where `table` gives the new place along."""
        line, column = places // self.inner, places % self.inner
        along = table[line % before]
        return torch.where(along < 0, -1, (line // before * after + along) * self.inner + column)

    def logical_range(self, start: int, stop: int) -> tuple[int, int]:
        """Bounds of the logical places of what is held from `start` to `stop`; not all between them need be held."""
        if self.outer == 1 and len(self.spans) == 1:
            offset = self.spans[0][0] * self.inner
            return offset + start, offset + stop
        line = self.held * self.inner
        first, last = start // line, (stop - 1) // line
        lowest, highest = min(start for start, _ in self.spans), max(start + size for start, size in self.spans)
        return (first * self.size + lowest) * self.inner, (last * self.size + highest) * self.inner
