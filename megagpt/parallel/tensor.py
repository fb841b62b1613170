"""Tensor-parallel layers: the single-device model's, each holding a share of the weight under the same name.

Letters as in `megagpt.model.layers`; n is the number of processes in the tensor group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megagpt.model import layout
from megagpt.model.layers import AttentionCore
from megagpt.model.layout import Shard
from megagpt.parallel.collectives import Region, gather

VOCABULARY_MULTIPLE = 8
"""Each process's share of the vocabulary is a multiple of it. Source: NVIDIA, matrix multiplication background user's
guide: tensor cores want dimensions of 16 bytes."""


class ColumnParallelLinear(nn.Linear):
    """Outputs are cut: the way into a region.

    Args:
        whole: the layer that this one holds a share of.
        region: the tensor group.
        sub_sizes: outputs of each of the matrices fused in `whole`.
    """

    def __init__(self, whole: nn.Linear, region: Region, sub_sizes: tuple[int, ...]) -> None:
        outputs = whole.out_features // region.size
        super().__init__(
            whole.in_features, outputs, whole.bias is not None, device=whole.weight.device, dtype=whole.weight.dtype
        )
        self.region = region
        self.shards = {
            name: layout.column(tuple(parameter.shape), sub_sizes, region.size, region.rank)
            for name, parameter in whole.named_parameters()
        }

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) or (B, T / n, C), as it is outside of the region -> (B, T, outputs / n)."""
        return F.linear(self.region.enter(x), self.weight, self.bias)


class GroupedQKVLinear(ColumnParallelLinear):
    """Queries, keys and values of grouped-query attention where there are fewer key and value heads than processes.

    Each key and value head is cut within itself, so that no weight is held twice; the projected channels are
    gathered, and each process takes the one head that its queries look at.
    """

    def __init__(self, whole: nn.Linear, region: Region, sub_sizes: tuple[int, ...], n_kv_head: int) -> None:
        super().__init__(whole, region, sub_sizes)
        self.q_size = sub_sizes[0] // region.size
        d_head = sub_sizes[1] // n_kv_head
        head = region.rank * n_kv_head // region.size
        self.head_channels = slice(head * d_head, (head + 1) * d_head)

    def forward(self, x: Tensor) -> Tensor:
        """As its base, -> (B, T, H / n * D + 2 D)."""
        q, kv = super().forward(x).tensor_split([self.q_size], dim=-1)
        part = torch.stack(kv.chunk(2, dim=-1), dim=-2)  # (B, T, 2, K D / n)
        heads = gather(part, part.dim() - 1, self.region.group, self.region.size)  # (B, T, 2, K D)
        return torch.cat((q, heads[..., self.head_channels].flatten(-2)), dim=-1)


class RowParallelLinear(nn.Linear):
    """Inputs are cut: the way out of a region. The bias is whole, and added once."""

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        inputs = whole.in_features // region.size
        super().__init__(
            inputs, whole.out_features, whole.bias is not None, device=whole.weight.device, dtype=whole.weight.dtype
        )
        self.region = region
        self.shards = {"weight": layout.row((whole.out_features, whole.in_features), region.size, region.rank)}

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs / n) -> (B, T, C) or (B, T / n, C), as it is outside of the region."""
        product = self.region.leave(F.linear(x, self.weight))
        return product if self.bias is None else product + self.bias


class GatheredLinear(ColumnParallelLinear):
    """In the place of a `RowParallelLinear`, where each sum shall be taken as one process takes it.

    Inputs are cut as the layer before leaves them, and gathered; outputs are cut, and gathered. No gradient: it is for
    evaluation. It sends 1.75 times as much as the sums over partial products of a GPT-2 block.
    """

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        super().__init__(whole, region, (whole.out_features,))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs / n) -> (B, T, C)."""
        inputs = gather(x, x.dim() - 1, self.region.group, self.region.size).contiguous()
        outputs = super().forward(inputs)
        return gather(outputs, x.dim() - 1, self.region.group, self.region.size).contiguous()


class VocabParallelEmbedding(nn.Embedding):
    """Rows of the vocabulary are cut; a process gives zeros for the tokens of the others.

    Source: Shoeybi et al. 2019, section 3.
    """

    def __init__(self, whole: nn.Embedding, region: Region) -> None:
        shard = vocabulary_shard(whole.num_embeddings, whole.embedding_dim, region)
        super().__init__(shard.local_size, whole.embedding_dim, device=whole.weight.device, dtype=whole.weight.dtype)
        self.region = region
        self.shards = {"weight": shard}

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C) or (B, T / n, C), as it is outside of the region."""
        ((start, size),) = self.shards["weight"].spans
        local = tokens - start
        elsewhere = (local < 0) | (local >= size)
        vectors = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.region.leave(vectors.masked_fill(elsewhere[..., None], 0))


class VocabParallelHead(nn.Linear):
    """Logits of a share of the vocabulary: `vocab_parallel_nll` never puts them together."""

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        shard = vocabulary_shard(whole.out_features, whole.in_features, region)
        super().__init__(
            whole.in_features, shard.local_size, bias=False, device=whole.weight.device, dtype=whole.weight.dtype
        )
        self.region = region
        self.shards = {"weight": shard}

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) or (B, T / n, C) -> (B, T, V / n), with columns for the padding at the end."""
        return F.linear(self.region.enter(x), self.weight)


class SequencePositions(nn.Embedding):
    """Learned positions of this process's part of the sequence."""

    def __init__(self, whole: nn.Embedding, region: Region) -> None:
        super().__init__(
            whole.num_embeddings, whole.embedding_dim, device=whole.weight.device, dtype=whole.weight.dtype
        )
        self.region = region

    def forward(self, positions: Tensor) -> Tensor:
        """(T,) or (B, T) -> (T / n, C) or (B, T / n, C)."""
        return super().forward(positions.tensor_split(self.region.size, dim=-1)[self.region.rank])


class RankedAttentionCore(AttentionCore):
    """Attention over this process's heads: dropout differs from the other heads'."""

    def __init__(self, whole: AttentionCore, region: Region, *, grouped: bool) -> None:
        super().__init__(1, 1, whole.dropout)
        self.grouped = grouped
        self.region = region

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Any = None) -> Tensor:
        """As its base."""
        with own_random_numbers(self.region.rank, q.device):
            return super().forward(q, k, v, visible)


class RankedDropout(nn.Dropout):
    """Dropout over this process's part of the sequence: it differs from the other parts'."""

    def __init__(self, whole: nn.Dropout, region: Region) -> None:
        super().__init__(whole.p)
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        """(B, T / n, C) -> the same shape."""
        with own_random_numbers(self.region.rank, x.device):
            return super().forward(x)


@contextmanager
def own_random_numbers(rank: int, device: torch.device) -> Iterator[None]:
    """Inside, random numbers differ between the processes of a tensor group; outside they go on in step.

    All draw one number from the CPU's generator, which is in step, and seed with it and their rank. So nothing is kept
    between calls, and recomputed activations, for which PyTorch winds the generators back, drop the same elements.
    """
    seed = int(torch.randint(2**62, (), device="cpu")) + rank
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        torch.manual_seed(seed)
        yield


def vocabulary_shard(vocab_size: int, d_model: int, region: Region) -> Shard:
    """The rows that a process of the region holds."""
    return layout.vocab((vocab_size, d_model), region.size, region.rank, VOCABULARY_MULTIPLE)
