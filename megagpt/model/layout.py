"""Which part of a logical tensor a process holds: declared once a weight, and everything else follows from it.

A logical tensor is a parameter as if there were one process. Initial values, checkpoint slices, DeepSpeed's tags and
the gradient norm all ask here, so that they cannot disagree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["column", "row", "vocab", "replicated"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How tensor parallelism cuts a weight (PyTorch's linear weights are (out, in)).

    Source: Shoeybi et al. 2019, section 3 (column, row and vocabulary).
    """

    kind: Kind
    """column: outputs are cut; row: inputs are cut; vocab: as column, padded at the end; replicated: not cut."""
    dim: int = 0
    """The dimension that is cut."""
    sub_sizes: tuple[int, ...] = ()
    """Sizes along `dim` of the matrices that are fused in this one, such as q, k and v: each is cut by itself."""
    summed: bool = False
    """replicated only: each process of the tensor group sees a part of the gradient, and the parts are added up."""


@dataclass(frozen=True)
class Shard:
    """The part of one logical tensor that one process of a tensor group holds.

    Along `layout.dim` it is the process's share of each sub-matrix, one after the other, then padding if any.
    """

    layout: Layout
    shape: tuple[int, ...]
    """Of the logical tensor."""
    degree: int = 1
    """Processes in the tensor group."""
    rank: int = 0
    """Place of this process in it."""
    local_size: int = 0
    """Length along `layout.dim` of what is held, padding included."""

    @property
    def is_cut(self) -> bool:
        """False where every process of the tensor group holds the whole."""
        return self.layout.kind != "replicated"

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(start, size) along `layout.dim` of the logical tensor, in the order they are held; none if it is not cut."""
        if self.layout.kind == "vocab":
            start = min(self.rank * self.local_size, self.shape[0])
            return ((start, min(self.local_size, self.shape[0] - start)),)
        spans, before = [], 0
        for size in self.layout.sub_sizes:
            share = size // self.degree
            spans.append((before + self.rank * share, share))
            before += size
        return tuple(spans)

    @cached_property
    def held_numel(self) -> int:
        """Elements of the logical tensor that are held: the local tensor's, without its padding at the end."""
        if not self.is_cut:
            return math.prod(self.shape)
        return sum(size for _, size in self.spans) * math.prod(self.shape) // self.shape[self.layout.dim]

    def cut(self, whole: Tensor) -> Tensor:
        """The part of a logical tensor that is held; padding is zero."""
        if not self.is_cut:
            return whole
        dim = self.layout.dim
        parts = [whole.narrow(dim, start, size) for start, size in self.spans]
        padding = self.local_size - sum(size for _, size in self.spans)
        if padding:
            parts.append(whole.new_zeros(*whole.shape[:dim], padding, *whole.shape[dim + 1 :]))
        return torch.cat(parts, dim)


@dataclass(frozen=True, slots=True)
class Extent:
    """A contiguous part of a flattened logical tensor, or of a shard of it: where it lies, without its values."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    start: int
    """First element of the part in the flattened tensor, or in the flattened shard."""
    numel: int
    shard: Shard | None = None
    """What is held of a tensor that is cut over a tensor group."""


def column(shape: tuple[int, ...], sub_sizes: tuple[int, ...], degree: int, rank: int) -> Shard:
    """Outputs are cut: of a weight (out, in) or a bias (out)."""
    return Shard(Layout("column", 0, sub_sizes), shape, degree, rank, shape[0] // degree)


def row(shape: tuple[int, int], degree: int, rank: int) -> Shard:
    """Inputs are cut: of a weight (out, in)."""
    return Shard(Layout("row", 1, (shape[1],)), shape, degree, rank, shape[1] // degree)


def vocab(shape: tuple[int, int], degree: int, rank: int, multiple: int) -> Shard:
    """Rows of a vocabulary are cut, each process's share rounded up to a multiple; what is too much is padding."""
    share = -(-shape[0] // (degree * multiple)) * multiple
    return Shard(Layout("vocab", 0, (shape[0],)), shape, degree, rank, share)
