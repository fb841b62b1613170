"""Next tokens and scores from a model that several processes share: stages of a pipeline, tensor groups, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagpt.model.decoder import HEAD, Decoder, Elsewhere
from megagpt.model.layers import Block, KVCache
from megagpt.model.packed import PackedStep, Packing, kept_for
from megagpt.model.scoring import score_logits, score_targets
from megagpt.parallel.collectives import gather
from megagpt.parallel.cross_entropy import vocab_parallel_scores
from megagpt.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Leg:
    """Layers that follow each other in one process, and the processes before and behind them."""

    blocks: tuple[Block, ...]
    source: int | None
    """Rank that sends the hidden vectors; None: they come from the tokens."""
    target: int | None
    """Rank that gets them; None: the head is here."""
    normed: bool
    """The final norm is its last layer but the head."""


class ParallelDecoder(nn.Module):
    """A `ScoringModel`, where this process holds a share of the model (`train.build.build_share`).

    Every process of one data coordinate calls the same methods with the same arguments, and every one gets the
    answer: so they all choose the same tokens. The hidden vectors go from stage to stage, and back from the last one
    goes the answer: logits of one position a row, or a log-probability and a bit for each scored token.

    Args:
        share: cut with `tensor_sequence` off (or inside `whole_sequences`): any number of positions may come.
        mesh: this process's place.
        stages: the layers of each stretch, where a process holds two of them (DualPipeV's leg out and leg back).
    """

    def __init__(self, share: Decoder, mesh: Mesh, stages: Sequence[range] | None = None) -> None:
        super().__init__()
        self.training = share.training
        self.share = share
        self.sizes = share.sizes
        self.mesh = mesh
        self.weight = next(share.parameters())
        self._n_parts = mesh.pipeline if stages is None else len(stages)
        own = sorted({mesh.pipeline_rank, self._n_parts - 1 - mesh.pipeline_rank} if stages else {mesh.pipeline_rank})
        self.legs = [self._leg(part, None if stages is None else stages[part]) for part in own]
        self.head_rank = self._rank_of(self._n_parts - 1)
        last = self.legs[-1]
        self._ends_here = last.target is None and bool(last.blocks)
        """The last of this process's blocks is the last of the model."""

    @property
    def device(self) -> torch.device:
        """Where tokens must be."""
        return self.weight.device

    @property
    def packing(self) -> Packing:
        """As `Decoder.packing`."""
        return self.share.packing

    @packing.setter
    def packing(self, packing: Packing) -> None:
        self.share.packing = packing

    def new_cache(self, n_rows: int, n_slots: int) -> KVCache:
        """As `Decoder.new_cache`, for this process's blocks and heads."""
        slots = self.packing.slots(n_slots)
        heads = max(1, self.sizes.n_kv_head // self.mesh.tensor)
        n_layer = max(1, sum(len(leg.blocks) for leg in self.legs))  # a stage may hold the head alone
        return KVCache(n_layer, (n_rows, slots, heads, self.sizes.d_head), like=self.weight.detach())

    def decode(
        self, tokens: Tensor, cache: KVCache, n_new: Sequence[int], n_wanted: Sequence[int] | None = None
    ) -> Tensor:
        """As `Decoder.decode`, on every process."""
        n_wanted = n_wanted or [1] * len(tokens)
        step = PackedStep(tokens, cache, n_new, self.packing, n_wanted if self._ends_here else None)
        hidden = self._hidden(step)
        if hidden is None:
            logits = self.weight.new_empty(sum(n_wanted), self.sizes.vocab_size)
        else:
            last = hidden[0, step.kept.last(n_wanted)]
            logits = self._whole(self._head(self.packing.fill(last))[: len(last)])
        return self._from_head(logits)

    def score(
        self, tokens: Tensor, cache: KVCache, n_new: Sequence[int], wanted: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `megagpt.model.scoring.ScoringModel.score`; no logit leaves the process that computes it."""
        width = tokens.shape[1]
        kept = kept_for(wanted, n_new, width) if self._ends_here else None
        step = PackedStep(tokens, cache, n_new, self.packing, kept)
        hidden = self._hidden(step)
        if hidden is None:
            found = torch.empty(2, len(targets), dtype=torch.float32, device=self.device)
        else:
            at = step.kept.find(wanted, width)
            shard = self.share.shards.get(HEAD)
            n_logits = self.sizes.vocab_size if shard is None else shard.local_size
            values, greedy = score_targets(
                self._head, hidden[0], at, targets, n_logits=n_logits, packing=self.packing, scorer=self._score
            )
            found = torch.stack((values, greedy.float()))
        log_probabilities, greedy = self._from_head(found)
        return log_probabilities, greedy > 0

    def finish(self) -> None:
        """This process has nothing more to ask; see `megagpt.engine.live` for models to which that matters."""

    def _head(self, x: Tensor) -> Tensor:
        """(n, C) behind the final norm -> this process's logits (n, V / tensor)."""
        logits: Tensor = self.share.head(x)
        return logits

    def _score(self, logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `score_logits`, from this process's logits."""
        if self.mesh.groups is None or self.mesh.tensor == 1:
            return score_logits(logits, rows, targets)
        return vocab_parallel_scores(logits, rows, targets, self.share.shards[HEAD], self.mesh.groups.tensor)

    def _hidden(self, step: PackedStep) -> Tensor | None:
        """(1, M, C) behind the final norm where the head is; None on the other stages."""
        x: Tensor | None = None
        layer = 0
        for leg in self.legs:
            x = self._arrived(leg, x, step)
            for block in leg.blocks:
                x = block.decode(x, step, layer)
                layer += 1
            if leg.normed:
                x = self.share.final_norm(x)
            if leg.target not in (None, self.mesh.rank):
                torch.distributed.send(x.contiguous(), leg.target)
        return x if self.legs[-1].target is None else None

    def _arrived(self, leg: Leg, x: Tensor | None, step: PackedStep) -> Tensor:
        """(1, M, C) that the leg begins with."""
        if leg.source is None:
            return self.share.embedding.at(step.tokens, step.positions)
        if leg.source == self.mesh.rank and x is not None:
            return x
        received = self.weight.new_empty(*step.positions.shape, self.sizes.d_model)
        torch.distributed.recv(received, leg.source)
        return received

    def _from_head(self, answer: Tensor) -> Tensor:
        """What the stage with the head has, on all stages."""
        if self.mesh.groups is not None and self.mesh.pipeline > 1:
            torch.distributed.broadcast(answer, self.head_rank, group=self.mesh.groups.pipeline)
        return answer

    def _whole(self, logits: Tensor) -> Tensor:
        """(B, V / n) of the tensor group, with padding -> (B, V)."""
        if self.mesh.groups is None or self.mesh.tensor == 1:
            return logits
        return gather(logits, 1, self.mesh.groups.tensor, self.mesh.tensor)[:, : self.sizes.vocab_size].contiguous()

    def _leg(self, part: int, layers: range | None) -> Leg:
        """A stretch of layers; where none is told, all that are here."""
        n_layer = len(self.share.blocks)
        indices = range(n_layer + 3) if layers is None else layers
        blocks = [self.share.blocks[index - 1] for index in indices if 1 <= index <= n_layer]
        here = tuple(block for block in blocks if not isinstance(block, Elsewhere))
        return Leg(
            here,  # type: ignore[arg-type]
            source=None if part == 0 else self._rank_of(part - 1),
            target=None if part == self._n_parts - 1 else self._rank_of(part + 1),
            normed=n_layer + 1 in indices and not isinstance(self.share.final_norm, Elsewhere),
        )

    def _rank_of(self, part: int) -> int:
        """The process that holds a stretch, among those with this one's other coordinates."""
        stage = min(part, self._n_parts - 1 - part) if self._n_parts > self.mesh.pipeline else part
        stride = self.mesh.world_size // self.mesh.pipeline
        return self.mesh.rank + stride * (stage - self.mesh.pipeline_rank)
