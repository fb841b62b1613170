"""The hidden matrices of a model, each by itself and whole, wherever its parts lie.

Several matrices are fused in one weight (q, k and v; gate and up), and tensor parallelism cuts each of them. What works
on a matrix as such, as Muon's orthogonalisation does, must neither see two as one nor a part as the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megagpt.model.decoder import Decoder
from megagpt.model.layers import Attention
from megagpt.model.layout import Shard, column
from megagpt.parallel.apply_tensor import FUSED, qkv_sizes


@dataclass(frozen=True, slots=True)
class HiddenMatrix:
    """A weight of a block: one matrix, or several above one another.

    Source for taking them apart: Jordan et al. 2024 (q, k and v each by itself); Megatron-core's `muon_split_qkv`, on
    by default. The same holds for gate and up: two linear maps that are stored together for speed.
    """

    name: str
    parameter: nn.Parameter
    shard: Shard
    """What this process holds of it, and the sizes of what is fused in it; of degree 1 where it holds everything."""

    def map_whole(self, held: Tensor, function: Callable[[Tensor], Tensor], group: ProcessGroup | None) -> Tensor:
        """Apply a function to each whole matrix.

        Every process of the tensor group calls it, and each works on the whole.

        Args:
            held: this process's part, in the shape of its parameter.
            function: (A, B) -> (A, B).
            group: the tensor group; None where it is of one process.

        Returns:
            this process's part of the results.
        """
        shard, dim = self.shard, self.shard.layout.dim
        parts = _gathered(held, group, shard.degree)
        results, before = [], 0
        for size in shard.layout.sub_sizes:
            share = size // shard.degree
            whole = torch.cat([part.narrow(dim, before, share) for part in parts], dim)
            results.append(function(whole).narrow(dim, shard.rank * share, share))
            before += share
        return torch.cat(results, dim)


def hidden_matrices(model: Decoder) -> list[HiddenMatrix]:
    """Every weight of the blocks that is a matrix; not the embedding, positions, head, norms and biases.

    Source: Jordan et al. 2024: embedding and head are left to AdamW, though they are matrices.
    """
    return [
        HiddenMatrix(name, parameter, model.shards.get(name) or _uncut(model, name, parameter))
        for name, parameter in model.named_parameters()
        if name.startswith("blocks.") and parameter.dim() == 2
    ]


def share_out(matrices: list[HiddenMatrix], degree: int) -> dict[str, int]:
    """Name -> which of `degree` processes updates it: the largest matrix first, each to the one that has least."""
    owners, load = {}, [0] * degree
    for matrix in sorted(matrices, key=lambda matrix: -math.prod(matrix.shard.shape)):
        owners[matrix.name] = load.index(min(load))
        load[owners[matrix.name]] += math.prod(matrix.shard.shape)
    return owners


def _uncut(model: Decoder, name: str, parameter: nn.Parameter) -> Shard:
    layer, _, _ = name.rpartition(".")
    parent = model.get_submodule(layer.rpartition(".")[0])
    own_name = layer.rpartition(".")[2]
    count = FUSED.get(own_name, 1)
    sizes: tuple[int, ...] = (parameter.shape[0] // count,) * count
    if isinstance(parent, Attention) and own_name == "qkv":
        sizes = qkv_sizes(parent)
    return column(tuple(parameter.shape), sizes, degree=1, rank=0)


def _gathered(held: Tensor, group: ProcessGroup | None, degree: int) -> list[Tensor]:
    if degree == 1:
        return [held]
    n_rows, n_columns = held.shape
    parts = held.new_empty(degree * n_rows, n_columns)
    torch.distributed.all_gather_into_tensor(parts, held.contiguous(), group=group)
    return list(parts.chunk(degree))
