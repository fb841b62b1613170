"""Next-token loss. Summed, not averaged: whoever knows how many targets the whole step has divides by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORED_TARGET = -100
"""Targets with this value do not count. Source: PyTorch's `cross_entropy` default."""

FP32_LOGITS = {"cpu": 2**19, "cuda": 2**26}
"""Device type -> logits that are in fp32 at once: what a processor's cache holds, or enough to keep a GPU busy."""


def next_token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats, in fp32 whatever the type of the logits.

    Neither the logits nor their gradient are ever whole in fp32: a few rows at a time are, in forward and again in
    backward. Not differentiable twice.

    Args:
        logits: (..., V).
        targets: (...) int64: the token that follows, or `IGNORED_TARGET`.

    Returns:
        A scalar; 0 where no target counts.
    """
    return _NextTokenNLL.apply(logits.flatten(0, -2), targets.flatten())  # type: ignore[no-untyped-call]


class _NextTokenNLL(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """(N, V), (N,) -> a scalar."""
        ctx.save_for_backward(logits, targets)
        nll = torch.zeros((), dtype=torch.float32, device=logits.device)
        for rows in _stretches(logits):
            nll += F.cross_entropy(logits[rows].float(), targets[rows], ignore_index=IGNORED_TARGET, reduction="sum")
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of one row's loss: its probabilities, less 1 at the target."""
        logits, targets = ctx.saved_tensors
        counted = targets != IGNORED_TARGET
        weights = (counted * gradients[0])[:, None]
        at_target = targets.masked_fill(~counted, 0)[:, None]
        gradient = torch.empty_like(logits)
        for rows in _stretches(logits):
            of_rows = torch.softmax(logits[rows].float(), dim=-1).mul_(weights[rows])
            of_rows.scatter_add_(1, at_target[rows], -weights[rows])
            gradient[rows] = of_rows
        return gradient, None


def _stretches(logits: Tensor) -> Iterator[slice]:
    """Rows of (N, V) that are worked on together."""
    size = max(1, FP32_LOGITS[logits.device.type] // logits.shape[1])
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


def count_targets(targets: Tensor) -> Tensor:
    """How many targets count: an int64 scalar on the targets' device, so that nothing waits for it."""
    return torch.count_nonzero(targets != IGNORED_TARGET)
