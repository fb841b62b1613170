"""Next-token loss and scores over a vocabulary that is cut over the tensor group; logits are never put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup, ReduceOp

from megagpt.model.layout import Shard
from megagpt.model.loss import IGNORED_TARGET


def vocab_parallel_nll(logits: Tensor, targets: Tensor, shard: Shard, group: ProcessGroup) -> Tensor:
    """Summed negative log-likelihood in nats, in fp32 whatever the type of the logits; the same on all processes.

    Two numbers a token go over the wire, and no logit. Padding columns have probability 0.

    Args:
        logits: (..., V / n), this process's share with the padding.
        targets: (...) int64, the same on all: the token that follows, or `IGNORED_TARGET`.
        shard: the rows of the head that made the logits.
        group: the tensor group.

    Source: Shoeybi et al. 2019, section 3 (the loss fused with the output layer).
    """
    return _VocabParallelNLL.apply(logits, targets, shard, group)  # type: ignore[no-any-return, no-untyped-call]


def vocab_parallel_scores(
    logits: Tensor, rows: Tensor, targets: Tensor, shard: Shard, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """As `megagpt.model.scoring.score_logits`, the same on all processes.

    Two numbers a row and two a target go over the wire. Of equally large logits the one with the lowest index is the
    argmax, as in `torch.argmax`, whichever process holds it.

    Args:
        logits: (n, V / processes), this process's share with the padding, which never counts.
        rows: (N,) int64, the row of each target.
        targets: (N,) int64, the same on all.
        shard: the rows of the head that made the logits.
        group: the tensor group.
    """
    ((start, _),) = shard.spans
    x = _below_peak(logits, shard, group, torch.float64 if logits.dtype == torch.float32 else torch.float32)
    local, held = _columns_here(targets, shard)
    at_target = x[rows, local].masked_fill(~held, 0.0)
    columns = torch.arange(start, start + x.shape[1], device=x.device)
    ahead = ((x == 0)[rows] & (columns < targets[:, None])).sum(dim=-1)  # as large as any, and before the target
    sums = torch.cat((x.exp_().sum(dim=-1), at_target, ahead.to(x.dtype)))
    torch.distributed.all_reduce(sums, group=group)
    total, at_target, ahead = torch.split(sums, [len(x), len(targets), len(targets)])
    return (at_target - total.log()[rows]).float(), (at_target == 0) & (ahead == 0)


def _below_peak(logits: Tensor, shard: Shard, group: ProcessGroup, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits less the largest of the whole vocabulary (N, V / n); -inf in the padding."""
    ((_, size),) = shard.spans
    x = logits.to(dtype, copy=True).flatten(0, -2)  # (N, V / n)
    x[:, size:] = -torch.inf
    peak = x.amax(dim=-1)
    torch.distributed.all_reduce(peak, ReduceOp.MAX, group=group)
    x -= peak[:, None]
    return x


def _columns_here(targets: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
    """(N,) targets -> the column of each in this process's share, and whether it is there at all."""
    ((start, size),) = shard.spans
    local = targets.flatten() - start
    held = (local >= 0) & (local < size)
    return local.masked_fill(~held, 0), held


class _VocabParallelNLL(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, shard: Shard, group: ProcessGroup) -> Tensor:
        x = _below_peak(logits, shard, group)
        local, held = _columns_here(targets, shard)
        at_target = x.gather(1, local[:, None])[:, 0].masked_fill(~held, 0.0)
        both = torch.stack((x.exp_().sum(dim=-1), at_target))
        torch.distributed.all_reduce(both, group=group)
        total, at_target = both
        x /= total[:, None]
        counted = targets.flatten() != IGNORED_TARGET
        ctx.save_for_backward(x, local, held, counted)
        ctx.like = (logits.shape, logits.dtype)
        nll: Tensor = (total.log() - at_target).masked_fill(~counted, 0.0)
        return nll.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, local, held, counted = ctx.saved_tensors
        shape, dtype = ctx.like
        weight = counted * gradients[0]
        gradient = probabilities * weight[:, None]
        gradient.scatter_add_(1, local[:, None], -(held * weight)[:, None])
        return gradient.view(shape).to(dtype), None, None, None
