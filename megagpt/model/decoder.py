"""A decoder as a flat list of layers: embedding, blocks, final norm, head.

What `forward` runs is what a pipeline cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagpt.model.attention import ChosenAttention
from megagpt.model.context import Context, Contexts, packed_rows, whole_rows
from megagpt.model.layers import AttentionCore, Block, Embedding, KVCache
from megagpt.model.layout import Shard
from megagpt.model.loss import next_token_nll
from megagpt.model.packed import FAST, PackedStep, Packing, kept_for
from megagpt.model.rotary import Rotary
from megagpt.model.scoring import score_targets

EMBEDDING = "embedding.tokens.weight"
HEAD = "head.weight"
"""The parameters that a tied head makes one."""


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """What a caller must know of a model's shape."""

    vocab_size: int
    max_seq_len: int
    """Tokens."""
    n_layer: int
    d_model: int
    n_kv_head: int
    d_head: int


def run_layers(layers: Iterable[nn.Module], x: Tensor, context: Context) -> Tensor:
    """One layer after the other; those to whom positions matter are told the context."""
    for layer in layers:
        # By keyword: DeepSpeed's hooks look for tensors in what is given by position, and know no other types.
        x = layer(x, context=context) if isinstance(layer, Embedding | Block) else layer(x)
    return x


def use_attention(model: Decoder, attention: ChosenAttention) -> None:
    """Take this implementation; with one for packed rows, `forward` wants the documents from now on.

    After the model was cut, since layers are replaced by that.
    """
    for module in model.modules():
        if isinstance(module, AttentionCore):
            module.attend = attention.attend
    model.contexts = whole_rows if attention.prepare is None else packed_rows(attention.prepare)


class Elsewhere(nn.Module):
    """The place of a layer that another stage holds."""


class Decoder(nn.Module):
    """Every layer takes and returns one tensor: (B, T) tokens, then (B, T, C), at last (B, T, V)."""

    def __init__(
        self,
        embedding: Embedding,
        blocks: Sequence[Block],
        final_norm: nn.Module,
        sizes: DecoderSizes,
        *,
        tied_head: bool,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.tied_head = tied_head
        self.shards: dict[str, Shard] = {}
        """Parameter name -> the part of it that this process holds; empty where it holds everything."""
        self.nll: Callable[[Tensor, Tensor], Tensor] = next_token_nll
        """(what `forward` gives, targets (B, T)) -> summed negative log-likelihood, nats, fp32."""
        self.contexts: Contexts = whole_rows
        """(B, T) document ids of a micro-batch, or None -> what its layers must know of them."""
        self.packing: Packing = FAST
        """How `decode` and `score` run: as fast as can be, or the same bit for bit in every batch."""
        self.shared_with_other_end: str | None = None
        """Parameter that the first and the last stage of a pipeline both hold: that of a tied head."""
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.head = nn.Linear(sizes.d_model, sizes.vocab_size, bias=False)
        self.tie_head()

    def layers(self) -> list[tuple[str, nn.Module]]:
        """Names and layers in the order they run; the index of a layer is the same in every layout."""
        blocks = [(f"blocks.{index}", block) for index, block in enumerate(self.blocks)]
        return [("embedding", self.embedding), *blocks, ("final_norm", self.final_norm), ("head", self.head)]

    def keep_layers(self, kept: Collection[int]) -> None:
        """Drop every layer but these (indices into `layers()`): what is left is a stage of a pipeline.

        Names stay as they are. A tied head gets a parameter of its own where its embedding is dropped.
        """
        has_embedding, has_head = 0 in kept, len(self.blocks) + 2 in kept
        if self.tied_head and has_embedding != has_head:
            self.shared_with_other_end = EMBEDDING if has_embedding else HEAD
            self.head.weight = nn.Parameter(torch.empty_like(self.head.weight))
        self.tied_head = self.tied_head and has_embedding and has_head
        for index, (name, _) in enumerate(self.layers()):
            if index not in kept:
                self.set_submodule(name, Elsewhere())

    def logical_name(self, name: str) -> str:
        """The name that a parameter of this process has where there is one process."""
        return EMBEDDING if name == HEAD == self.shared_with_other_end else name

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """(B, T) int64 -> logits (B, T, V). With (B, T) `documents` of a model that tells them apart."""
        layers = [layer for _, layer in self.layers()]
        return run_layers(layers, tokens, self.contexts(documents))

    def hidden(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, C): everything but the head."""
        layers = [layer for _, layer in self.layers()[:-1]]
        return run_layers(layers, tokens, self.contexts(None))

    @property
    def device(self) -> torch.device:
        """Where tokens must be."""
        return self.embedding.tokens.weight.device

    def new_cache(self, n_rows: int, n_slots: int) -> KVCache:
        """An empty key-value cache for `n_rows` sequences of at most `n_slots` tokens."""
        slots = self.packing.slots(n_slots)
        shape = (n_rows, slots, self.sizes.n_kv_head, self.sizes.d_head)
        return KVCache(len(self.blocks), shape, like=self.embedding.tokens.weight.detach())

    def decode(
        self, tokens: Tensor, cache: KVCache, n_new: Sequence[int], n_wanted: Sequence[int] | None = None
    ) -> Tensor:
        """Run the next tokens of each row, remember them in the cache, and predict what follows the last ones.

        Args:
            tokens: (B, T) int64; row b holds `n_new[b]` tokens, then anything.
            cache: from `new_cache`; it is extended.
            n_new: tokens of each row, from 1 to T.
            n_wanted: of each row, behind how many of its last new tokens; by default 1.

        Returns:
            Logits (N, V) of the tokens that follow those, row after row.
        """
        n_wanted = n_wanted or [1] * len(tokens)
        step = PackedStep(tokens, cache, n_new, self.packing, n_wanted)
        last = self._run(step)[0, step.kept.last(n_wanted)]
        return self.head(self.packing.fill(last))[: len(last)]

    def score(
        self, tokens: Tensor, cache: KVCache, n_new: Sequence[int], wanted: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `ScoringModel.score`."""
        width = tokens.shape[1]
        step = PackedStep(tokens, cache, n_new, self.packing, kept_for(wanted, n_new, width))
        found = step.kept.find(wanted, width)
        hidden = self._run(step)[0]
        return score_targets(self.head, hidden, found, targets, n_logits=self.sizes.vocab_size, packing=self.packing)

    def _run(self, step: PackedStep) -> Tensor:
        """(1, M, C) before the head."""
        x = self.embedding.at(step.tokens, step.positions)
        for index, block in enumerate(self.blocks):
            x = block.decode(x, step, index)  # type: ignore[operator]
        return self.final_norm(x)

    def tie_head(self) -> None:
        """Make a tied head share the embedding's parameter again (moving modules may have made a copy)."""
        if self.tied_head:
            self.head.weight = self.embedding.tokens.weight

    def reset_buffers(self) -> None:
        """Compute again what is neither parameter nor saved: `to_empty` leaves it undefined."""
        for module in self.modules():
            if isinstance(module, Rotary):
                module.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoder:  # noqa: FBT001, FBT002
        """As in `nn.Module`; leaving the meta device makes one new parameter per module, which unties a head."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie_head()
        return self
