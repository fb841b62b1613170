"""Next-token loss. Summed, not averaged: whoever knows how many targets the whole step has divides by them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED_TARGET = -100
"""Targets with this value do not count. Source: PyTorch's `cross_entropy` default."""


def next_token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood in nats, in fp32 whatever the type of the logits.

    Args:
        logits: (..., V).
        targets: (...) int64: the token that follows, or `IGNORED_TARGET`.

    Returns:
        A scalar; 0 where no target counts.
    """
    return F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )


def count_targets(targets: Tensor) -> Tensor:
    """How many targets count: an int64 scalar on the targets' device, so that nothing waits for it."""
    return torch.count_nonzero(targets != IGNORED_TARGET)
