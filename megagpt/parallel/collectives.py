"""What the processes of a tensor or sequence group send to each other inside forward and backward.

A *region* is a stretch of a block in which each process of the tensor group works on a share of its own: of the
columns, heads or vocabulary. Outside of it all of them hold the same (`TensorRegion`), or each holds a part of the
sequence (`SequenceRegion`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

POSITIONS = 1
"""The dimension of positions in (B, T, C)."""


class Region(Protocol):
    """The way into a region and out of it again."""

    group: ProcessGroup
    size: int
    rank: int

    def enter(self, x: Tensor) -> Tensor:
        """What is the same on all, or cut along the sequence -> the same (B, T, C) on all."""

    def leave(self, x: Tensor) -> Tensor:
        """A summand (B, T, C) from each -> the sum, the same on all or cut along the sequence."""


class TensorRegion:
    """Outside, every process of the group holds the same.

    Source: Shoeybi et al. 2019, section 3: `enter` is their f, `leave` their g.
    """

    def __init__(self, group: ProcessGroup, size: int, rank: int) -> None:
        self.group = group
        self.size = size
        self.rank = rank

    def enter(self, x: Tensor) -> Tensor:
        """(..., C) unchanged; its gradient is added up."""
        return _SumGradients.apply(x, self.group)  # type: ignore[no-any-return, no-untyped-call]

    def leave(self, x: Tensor) -> Tensor:
        """(..., C) summands -> their sum; its gradient goes to each unchanged."""
        return _Sum.apply(x, self.group)  # type: ignore[no-any-return, no-untyped-call]


class SequenceRegion(TensorRegion):
    """Outside, each process of the group holds T / size positions, in order.

    Source: Korthikanti et al. 2022, section 4.2.2: `enter` is their g, `leave` its conjugate.
    """

    def enter(self, x: Tensor) -> Tensor:
        """(B, T / size, C) of each -> (B, T, C) on all."""
        return gather(x, POSITIONS, self.group, self.size)

    def leave(self, x: Tensor) -> Tensor:
        """(B, T, C) summands -> (B, T / size, C) of their sum."""
        return _SumScatter.apply(x, POSITIONS, self.group, self.size)  # type: ignore[no-any-return, no-untyped-call]


def gather(x: Tensor, dim: int, group: ProcessGroup, size: int) -> Tensor:
    """The parts of all processes joined along `dim`; each part's gradient is the sum of what all made of it."""
    return _Gather.apply(x, dim, group, size)  # type: ignore[no-any-return, no-untyped-call]


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """(size, ...): part j of process i becomes part i of process j. Its gradient goes the same way back."""
    return _Exchange.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


class _SumGradients(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return summed(gradients[0], ctx.group), None


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004 - PyTorch's signature
        return summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup, size: int) -> Tensor:
        ctx.where = (dim, group, size)
        return _gathered(x, dim, group, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_scattered(gradients[0], *ctx.where), None, None, None


class _SumScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup, size: int) -> Tensor:
        ctx.where = (dim, group, size)
        return _sum_scattered(x, dim, group, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _gathered(gradients[0], *ctx.where), None, None, None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradients[0], ctx.group), None


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the group, in a new tensor: autograd may still hold the old one."""
    total = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total


def _gathered(x: Tensor, dim: int, group: ProcessGroup, size: int) -> Tensor:
    part = x.movedim(dim, 0).contiguous()
    whole = part.new_empty(size * part.shape[0], *part.shape[1:])
    torch.distributed.all_gather_into_tensor(whole, part, group=group)
    return whole.movedim(0, dim)


def _sum_scattered(x: Tensor, dim: int, group: ProcessGroup, size: int) -> Tensor:
    whole = x.movedim(dim, 0).contiguous()
    part = whole.new_empty(whole.shape[0] // size, *whole.shape[1:])
    torch.distributed.reduce_scatter_tensor(part, whole, group=group)
    return part.movedim(0, dim)


def _exchanged(x: Tensor, group: ProcessGroup) -> Tensor:
    sent = x.contiguous()
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group)
    return received
