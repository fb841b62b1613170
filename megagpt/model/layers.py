"""Blocks that the model families share: the attention core, the pre-norm block, dropout, the key-value cache.

Letters: B batch, T positions, C d_model, H query heads, K key and value heads, D d_head, F d_ff, V vocabulary,
S cache slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megagpt.model.attention import Attend, whole_sdpa
from megagpt.model.context import WHOLE_ROWS, Context


class KVCache:
    """Keys and values of the tokens seen so far, for a batch of rows of different lengths.

    Rows are left-aligned: the token at position p of a row lies in slot p, whatever the other rows hold. So a
    token's position is its slot, no row ever sees padding (a query sees slots up to its own), and stale slots
    behind a row's end are overwritten before they become visible.
    """

    def __init__(self, n_layer: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        """Room for `shape` = (B, S, K, D) keys and values in each layer, with the device and type of `like`.

        In memory a head's slots lie together, as matrix products want them.
        """
        B, n_slots, n_kv_head, d_head = shape
        in_memory = (B, n_kv_head, n_slots, d_head)
        self.keys = [like.new_zeros(in_memory).transpose(1, 2) for _ in range(n_layer)]
        self.values = [like.new_zeros(in_memory).transpose(1, 2) for _ in range(n_layer)]
        self.lengths = [0] * B

    @property
    def n_slots(self) -> int:
        """The most tokens that a row can hold."""
        return self.keys[0].shape[1]

    def drop_rows(self, gone: Sequence[int]) -> list[int]:
        """Take rows out; the last of the others move into their places, and the memory is kept.

        Returns:
            Of each row that is left, in its new place: which one it was.
        """
        left = len(self.lengths) - len(gone)
        kept = list(range(left))
        gaps = [row for row in gone if row < left]
        moving = [row for row in range(left, len(self.lengths)) if row not in gone]
        for gap, row in zip(gaps, moving, strict=True):
            used = self.lengths[row]
            for stored in self.keys + self.values:
                stored[gap, :used] = stored[row, :used]
            kept[gap], self.lengths[gap] = row, used
        self.keys = [keys[:left] for keys in self.keys]
        self.values = [values[:left] for values in self.values]
        self.lengths = self.lengths[:left]
        return kept

    def part(self, rows: slice) -> KVCache:
        """The same memory, with only these rows."""
        part = KVCache(0, (0, *self.keys[0].shape[1:]), like=self.keys[0])
        part.keys = [keys[rows] for keys in self.keys]
        part.values = [values[rows] for values in self.values]
        part.lengths = self.lengths[rows]
        return part

    def copy_rows(self, rows: Sequence[int], source: KVCache, source_rows: Sequence[int]) -> None:
        """Make row `rows[i]` what row `source_rows[i]` of another cache is.

        Raises:
            ValueError: one of those rows does not fit.
        """
        used = max(source.lengths[row] for row in source_rows)
        if used > self.n_slots:
            raise ValueError(
                f"a row of {used} tokens does not fit into {self.n_slots} slots; make the new cache longer"
            )
        for row, source_row in zip(rows, source_rows, strict=True):
            self.lengths[row] = source.lengths[source_row]
        to, of = (torch.tensor(each, device=self.keys[0].device) for each in (rows, source_rows))
        for stored, new in zip(source.keys + source.values, self.keys + self.values, strict=True):
            new[to, :used] = stored[of, :used]

    def expanded(self, rows: Sequence[int], n_slots: int) -> KVCache:
        """A new cache of `n_slots` slots whose row i begins as a copy of this one's row `rows[i]`."""
        copy = KVCache(len(self.keys), (len(rows), n_slots, *self.keys[0].shape[2:]), like=self.keys[0])
        copy.copy_rows(range(len(rows)), self, rows)
        return copy


class Step(Protocol):
    """New tokens on their way through the layers, beside a cache."""

    @property
    def positions(self) -> Tensor:
        """Position of each new token, shaped as the tokens are."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new keys and values (B, T, K, D); queries (B, T, H, D) over all that is stored -> (B, T, H * D).

        In a layer that goes on with fewer tokens, the answer is of those.
        """

    def going_on(self, x: Tensor, layer: int) -> Tensor:
        """(B, T, ...) into this layer's attention -> of the tokens that come out of it; all but in the last layer."""


class AttentionCore(nn.Module):
    """Causal softmax(q k^T / sqrt(D)) v without weights of its own.

    Source: Vaswani et al. 2017, section 3.2.1; grouped heads: Ainslie et al. 2023, section 2.2.
    """

    def __init__(self, n_head: int, n_kv_head: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.grouped = n_head != n_kv_head
        self.dropout = dropout
        self.attend: Attend = whole_sdpa

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Any = None) -> Tensor:
        """(B, T, H, D), (B, T, K, D), (B, T, K, D), `Context.visible` -> (B, T, H * D)."""
        return self.attend(q, k, v, visible, dropout=self.dropout * self.training, grouped=self.grouped)


class Attention(nn.Module):
    """What a family's attention has, and gives beside `forward`: one step with a key-value cache."""

    n_head: int
    n_kv_head: int
    d_head: int
    qkv: nn.Linear
    core: AttentionCore
    output: nn.Linear

    def decode(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """(B, T, C) new tokens -> (B, T, C), looking also at what the cache holds."""
        raise NotImplementedError


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward.

    Source: Radford et al. 2019, section 2.3 (layer normalisation moved to the input of each sub-block).
    """

    def __init__(
        self, attention_norm: nn.Module, attention: Attention, feed_forward_norm: nn.Module, feed_forward: nn.Module
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, *, context: Context = WHOLE_ROWS) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), context=context)
        return x + self.feed_forward(self.feed_forward_norm(x))

    def decode(self, x: Tensor, step: Step, layer: int) -> Tensor:
        """As `forward`, for new tokens behind those in the cache."""
        attended = self.attention.decode(self.attention_norm(x), step, layer)
        x = step.going_on(x, layer) + attended
        return x + self.feed_forward(self.feed_forward_norm(x))


class Embedding(nn.Module):
    """Tokens to vectors: a family's first layer. Its table is `tokens`, which a tied head shares."""

    tokens: nn.Embedding
    stretch: int = 0
    """Which stretch of its sequences `forward` gets: with T tokens, they begin at position stretch * T."""

    def at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, T) tokens at (B, T) positions -> (B, T, C)."""
        raise NotImplementedError


def dropout_layer(probability: float) -> nn.Module:
    """Dropout, or nothing at all where the probability is 0."""
    return nn.Dropout(probability) if probability > 0 else nn.Identity()
