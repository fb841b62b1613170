"""Next tokens from a model that several processes share: stages of a pipeline, tensor groups, or both."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megagpt.model.decoder import Decoder, Elsewhere
from megagpt.model.layers import Block, KVCache
from megagpt.parallel.collectives import gather
from megagpt.parallel.mesh import Mesh


class ParallelDecoder(nn.Module):
    """What `generate` asks of a model, where this process holds a share of it (`train.build.build_share`).

    Every process of the mesh calls the same methods with the same arguments, and every one gets the logits: so they
    all choose the same tokens. The hidden vectors go from stage to stage, the logits back from the last one.

    Args:
        share: cut with `tensor_sequence` off; generation looks at one position at a time.
        mesh: without a data and a sequence axis.
    """

    def __init__(self, share: Decoder, mesh: Mesh) -> None:
        super().__init__()
        self.share = share
        self.sizes = share.sizes
        self.mesh = mesh
        blocks = [block for block in share.blocks if not isinstance(block, Elsewhere)]
        self.blocks: list[Block] = blocks  # type: ignore[assignment]
        stride = mesh.world_size // mesh.pipeline
        self.first, self.last = mesh.pipeline_rank == 0, mesh.pipeline_rank == mesh.pipeline - 1
        self.previous_rank, self.next_rank = mesh.rank - stride, mesh.rank + stride
        self.last_rank = mesh.rank + stride * (mesh.pipeline - 1 - mesh.pipeline_rank)
        self.weight = next(share.parameters())

    @property
    def device(self) -> torch.device:
        """Where tokens must be."""
        return self.weight.device

    def new_cache(self, n_rows: int, n_slots: int) -> KVCache:
        """As `Decoder.new_cache`, for this process's blocks and heads."""
        heads = max(1, self.sizes.n_kv_head // self.mesh.tensor)
        return KVCache(len(self.blocks), (n_rows, n_slots, heads, self.sizes.d_head), like=self.weight.detach())

    def decode(self, tokens: Tensor, cache: KVCache, n_new: Sequence[int]) -> Tensor:
        """As `Decoder.decode`: logits (B, V) of what follows each row's last new token, on every process."""
        B, T = tokens.shape
        step = cache.extend(n_new, T)
        if self.first:
            x = self.share.embedding.at(tokens, step.positions)
        else:
            x = self.weight.new_empty(B, T, self.sizes.d_model)
            torch.distributed.recv(x, self.previous_rank)
        for index, block in enumerate(self.blocks):
            x = block.decode(x, step, index)
        if not self.last:
            torch.distributed.send(x.contiguous(), self.next_rank)
            logits = self.weight.new_empty(B, self.sizes.vocab_size)
        else:
            rows = torch.arange(B, device=x.device)
            logits = self._whole(self.share.head(self.share.final_norm(x)[rows, torch.tensor(n_new) - 1]))
        if self.mesh.groups is not None and self.mesh.pipeline > 1:
            torch.distributed.broadcast(logits, self.last_rank, group=self.mesh.groups.pipeline)
        return logits

    def _whole(self, logits: Tensor) -> Tensor:
        """(B, V / n) of the tensor group, with padding -> (B, V)."""
        if self.mesh.groups is None or self.mesh.tensor == 1:
            return logits
        return gather(logits, 1, self.mesh.groups.tensor, self.mesh.tensor)[:, : self.sizes.vocab_size].contiguous()
