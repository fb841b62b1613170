"""Ulysses sequence parallelism applied from outside: each process holds a stretch of every sequence.

Only attention looks across positions: around it the group trades stretches with all heads for whole sequences with a
share of the heads. Everything else sees a shorter sequence and knows nothing of it. The group counts as data-parallel
processes to DeepSpeed: each has a part of every gradient, and ZeRO shards over it.

Letters as in `megagpt.model.layers`; s is the number of processes in the sequence group. With tensor parallelism H and
K are the heads that are left to one process of the tensor group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.model.decoder import Decoder
from megagpt.model.layers import AttentionCore, Block
from megagpt.model.rotary import Rotary
from megagpt.parallel.collectives import exchange
from megagpt.parallel.mesh import Mesh


class SequenceParallelCore(nn.Module):
    """Attention over whole sequences and a share of the heads, between two all-to-alls.

    Where there are fewer key and value heads than processes, each head goes to all processes whose queries look at it,
    and its gradient is the sum of theirs.

    It holds the core that does the work, so that recomputing that one (`train.recompute=selective`) sends nothing
    again. Source: Jacobs et al. 2023, section 3.1.
    """

    def __init__(self, whole: AttentionCore, group: ProcessGroup, size: int) -> None:
        super().__init__()
        self.core = whole
        self.group = group
        self.size = size

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Any = None) -> Tensor:
        """(B, T / s, H, D), (B, T / s, K, D), (B, T / s, K, D) -> (B, T / s, H * D); `visible` is of whole rows."""
        sent = [self._heads_of_each(x) for x in (q, k, v)]
        received = exchange(torch.cat(sent, dim=-2), self.group)  # (s, B, T / s, heads, D), a stretch from each
        whole = received.movedim(0, 1).flatten(1, 2)  # (B, T, heads, D)
        heads = torch.split(whole, [x.shape[-2] for x in sent], dim=-2)
        attended: Tensor = self.core(*heads, visible)  # (B, T, H / s * D)
        stretches = torch.unflatten(attended, 1, (self.size, -1)).movedim(1, 0)
        return exchange(stretches, self.group).movedim(0, -2).flatten(-2)

    def _heads_of_each(self, x: Tensor) -> Tensor:
        """(B, T / s, H, D) -> (s, B, T / s, H / s, D), or (s, B, T / s, 1, D) where s is a multiple of H."""
        n_parts = min(self.size, x.shape[2])
        parts = torch.unflatten(x, 2, (n_parts, -1)).movedim(2, 0)[:, None]
        return parts.expand(-1, self.size // n_parts, *parts.shape[2:]).flatten(0, 1)


def apply_sequence_parallel(model: Decoder, mesh: Mesh) -> None:
    """Share out every sequence over the sequence group; with a group of one, leave the model as it is.

    After `apply_tensor_parallel`, whose heads are shared out further, and before layers are dropped for a pipeline.
    Parameters and their names stay as they are. The model then wants this process's stretch of the tokens
    (`TokenBatch.share`), and gives the logits and the loss of it.

    Args:
        model: from `build_model`.
        mesh: this process's place.
    """
    if mesh.groups is None or mesh.sequence == 1:
        return
    for block in model.blocks:
        assert isinstance(block, Block)  # noqa: S101 - a ModuleList does not know what it holds
        attention = block.attention
        n_head, n_kv_head = attention.n_head // mesh.sequence, max(1, attention.n_kv_head // mesh.sequence)
        attention.core.grouped = n_head != n_kv_head
        attention.core = SequenceParallelCore(  # type: ignore[assignment]
            attention.core, mesh.groups.sequence, mesh.sequence
        )
    model.embedding.stretch = mesh.sequence_rank
    for module in model.modules():
        if isinstance(module, Rotary):
            module.stretch = mesh.sequence_rank
