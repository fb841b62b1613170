"""New tokens of several rows laid end to end beside a key-value cache: only attention sees rows and padding.

Two ways to run them. `FAST` takes PyTorch's kernels as they are: how many rows run together decides which kernels, so
that one row's numbers may differ in the last digits from batch to batch. `row_invariant` keeps them the same bit for
bit, whatever the row is batched with and however its tokens are split between cache and input:

- Matrix products, norms and activations see a number of packed tokens that is a multiple of 32 a thread. Measured with
  MKL: from there on a row of a product does not depend on the other rows, and no vectorised loop has a tail, whose
  scalar arithmetic would differ.
- Attention is PyTorch's fused kernel for CPUs: it sums over keys in blocks of `BLOCK`, from the first one on, and keys
  that a query does not see add exact zeros. The library below splits a block's sum by its length, so the last block
  is short enough not to be split, or whole (see `CHAIN`).

That holds for one machine and one number of threads, in fp32 on a CPU; `evals` checks it before it relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from megagpt.model.layers import KVCache

BLOCK = 512
"""Keys that the fused kernel takes at once (`kv_split_size` of PyTorch's cpu_flash_attention)."""
CHAIN = 192
"""Keys that MKL sums without a break, on every processor so far. Measured: longer sums it breaks at places that depend
on their length and on the processor (one breaks all of 384 or more at 192, another those of 512 otherwise than of 288
to 480), so that a longer last block is filled up to a whole one."""
KEYS = 32
"""The last block's keys are a multiple of this: whole vectors."""
QUERIES = 128
"""Queries that look at the cache together; keys behind the last one's are left out."""
QUERY_MULTIPLE = 4
"""Fewer queries than four are multiplied by another routine."""
VECTOR = 32
"""Elements that an unrolled vector loop takes at once (two of 16 fp32)."""
GRAIN = 32768
"""Elements below which PyTorch uses one thread for an elementwise operation (at::internal::GRAIN_SIZE)."""
SCORE_BYTES = 2 << 20
"""Memory of a head's attention weights in one piece, in fp32, where a piece has more than one row.

Rows in different pieces look at no more keys than they have; a call for every row costs more where queries are few.
"""

Look = Callable[[Tensor, Tensor, Tensor, "PackedRows"], Tensor]
"""(B, T, H, D) queries over (B, S, K, D) keys and values -> (B, T, H * D)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How packed tokens are run."""

    multiple: int
    """Their number is filled up to a multiple of this."""
    least: int
    """And to this."""
    slots: Callable[[int], int]
    """Slots that a cache for so many tokens has."""
    look: Look
    invariant: bool
    """A row's numbers do not depend on its batch, nor on how its tokens are split over steps."""

    def filled(self, n: int) -> int:
        """Tokens to run so that `n` are."""
        return -(-max(n, self.least) // self.multiple) * self.multiple

    def fill(self, x: Tensor) -> Tensor:
        """(n, ...) -> (filled(n), ...), with zeros."""
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, self.filled(len(x)) - len(x)))


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that look at the cache together."""

    rows: slice
    columns: slice
    """Of the block of queries."""
    n_keys: int
    """From the first one on."""
    mask: Tensor
    """(b or 1, 1, n, n_keys) fp32: 0 where a query looks, else -inf. One for all rows that start alike."""


class PackedRows:
    """Where some tokens of several rows stand: end to end in (1, M, ...), or each row in a line of (B, T, ...)."""

    def __init__(
        self, starts: Sequence[int], n_tokens: Sequence[int], skipped: Sequence[int], packing: Packing, device: Any
    ) -> None:
        """Lay them out.

        Args:
            starts: position in its row of each row's first token.
            n_tokens: of each row.
            skipped: how many new tokens of each row stand before them.
            packing: how they are filled up.
            device: where they are.
        """
        self.starts = list(starts)
        self.ends = [start + n for start, n in zip(starts, n_tokens, strict=True)]
        self.device = device
        counts = torch.tensor(n_tokens)
        self.width = int(counts.max())
        self.n_tokens = int(counts.sum())
        self.n_packed = packing.filled(self.n_tokens)
        rows = torch.repeat_interleave(torch.arange(len(n_tokens)), counts)
        columns = torch.arange(self.n_tokens) - (counts.cumsum(0) - counts)[rows]
        self.rows, self.columns = rows.to(device), columns.to(device)
        self.slots = (columns + torch.tensor(self.starts)[rows]).to(device)
        self.new_columns = (columns + torch.tensor(list(skipped))[rows]).to(device)
        """Column of each token in the block of new tokens."""

    def find(self, wanted: Tensor, width: int) -> Tensor:
        """Positions in the flattened (B * T) block of new tokens -> indices of the packed tokens."""
        where = torch.full((len(self.starts) * width,), -1, device=self.device)
        where[self.rows * width + self.new_columns] = torch.arange(self.n_tokens, device=self.device)
        return where[wanted]

    def last(self, n: Sequence[int]) -> Tensor:
        """(sum of n,) indices of the last `n[b]` packed tokens of each row b, row after row."""
        ends = (torch.tensor(self.ends) - torch.tensor(self.starts)).cumsum(0)
        counts = torch.tensor(n)
        behind = counts.cumsum(0).repeat_interleave(counts) - torch.arange(int(counts.sum()))
        return (ends.repeat_interleave(counts) - behind).to(self.device)

    def packed(self, block: Tensor) -> Tensor:
        """(B, T, C) -> (1, M, C), zero behind the tokens."""
        packed = block.new_zeros(1, self.n_packed, block.shape[-1])
        packed[0, : self.n_tokens] = block[self.rows, self.columns]
        return packed

    def unpacked(self, x: Tensor, width: int) -> Tensor:
        """(1, M, ...) -> (B, width, ...), zero where a row has no token."""
        block = x.new_zeros(len(self.starts), width, *x.shape[2:])
        block[self.rows, self.columns] = x[0, : self.n_tokens]
        return block

    def visible(self, starts: Sequence[int], n: int, n_keys: int) -> Tensor:
        """(b, 1, n, n_keys) bool: which keys the queries see that begin at positions `starts`."""
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(n, device=self.device)
        return torch.arange(n_keys, device=self.device) <= positions[:, None, :, None]

    @cached_property
    def pieces(self) -> list[Piece]:
        """All queries, some rows and some columns at a time; they are the same in every layer."""
        pieces = []
        for first in range(0, self.width, QUERIES):
            starts = [start + first for start in self.starts]
            counts = [min(QUERIES, end - start) for start, end in zip(starts, self.ends, strict=True)]
            row = 0
            while row < len(starts):
                rows, n, n_keys = range(row, row), 0, 0
                while rows.stop < len(starts) and counts[rows.stop] > 0:
                    wider = max(n, -(-counts[rows.stop] // QUERY_MULTIPLE) * QUERY_MULTIPLE)
                    longer = max(n_keys, _rounded(starts[rows.stop] + counts[rows.stop]))
                    if rows and 4 * (len(rows) + 1) * wider * longer > SCORE_BYTES:
                        break
                    rows, n, n_keys = range(row, rows.stop + 1), wider, longer
                if rows:
                    pieces.append(self._piece(rows, first, n, n_keys))
                row = max(rows.stop, row + 1)
        return pieces

    def _piece(self, rows: range, first: int, n: int, n_keys: int) -> Piece:
        starts = [self.starts[row] + first for row in rows]
        seen = self.visible(starts[:1] if len(set(starts)) == 1 else starts, n, n_keys)
        mask = torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, float("-inf"))
        return Piece(slice(rows.start, rows.stop), slice(first, first + n), n_keys, mask)


class PackedStep(PackedRows):
    """As `Step`: x is (1, M, C), the new tokens of row 0, of row 1, ..., then padding that nobody looks at.

    The last block may go on with fewer tokens than it gets: all of them leave their keys and values in the cache, but
    nothing looks at what it makes of a token that no prediction is wanted behind.
    """

    def __init__(
        self,
        tokens: Tensor,
        cache: KVCache,
        n_new: Sequence[int],
        packing: Packing,
        n_kept: Sequence[int] | None = None,
    ) -> None:
        """Make room in the cache for the first `n_new[b]` tokens of each row b of (B, T) `tokens`.

        Args:
            tokens: the block.
            cache: what it stands behind.
            n_new: tokens of each row.
            packing: how they run.
            n_kept: of each row, how many of its last new tokens come out of the cache's last layer; None for all.

        Raises:
            ValueError: they do not fit.
        """
        super().__init__(cache.lengths, n_new, [0] * len(n_new), packing, tokens.device)
        if max(self.ends) > cache.n_slots:
            raise ValueError(f"key-value cache of {cache.n_slots} tokens cannot take {max(self.ends)}; make it longer")
        cache.lengths = list(self.ends)
        self.cache, self.packing = cache, packing
        self.positions = F.pad(self.slots, (0, self.n_packed - self.n_tokens))[None]  # (1, M)
        self.tokens = F.pad(tokens[self.rows, self.columns], (0, self.n_packed - self.n_tokens))[None]  # (1, M)
        self.kept: PackedRows = self
        """The tokens that come out of the cache's last layer."""
        self._last_layer = len(cache.keys) - 1
        if n_kept is not None and packing.filled(max(1, sum(n_kept))) < self.n_packed:
            n_kept = n_kept if any(n_kept) else [int(row == 0) for row in range(len(n_new))]
            starts = [end - kept for end, kept in zip(self.ends, n_kept, strict=True)]
            skipped = [new - kept for new, kept in zip(n_new, n_kept, strict=True)]
            self.kept = PackedRows(starts, n_kept, skipped, packing, tokens.device)

    def going_on(self, x: Tensor, layer: int) -> Tensor:
        """As `Step.going_on`."""
        if layer != self._last_layer or self.kept is self:
            return x
        kept = self.kept
        index = self.find(kept.rows * self.width + kept.new_columns, self.width)
        return self.packing.fill(x[0, index])[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Step.attend`, with (1, M, ...) tensors."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, self.slots] = k[0, : self.n_tokens]
        values[self.rows, self.slots] = v[0, : self.n_tokens]
        asking = self.kept if layer == self._last_layer else self
        width = -(-asking.width // QUERY_MULTIPLE) * QUERY_MULTIPLE
        block = asking.unpacked(self.going_on(q, layer), width)
        return asking.packed(self.packing.look(block, keys, values, asking))


def kept_for(wanted: Tensor, n_new: Sequence[int], width: int) -> list[int]:
    """How many of each row's last new tokens there are from the first wanted one on.

    Args:
        wanted: (N,) positions in the flattened (B * width) block of new tokens.
        n_new: tokens of each row.
        width: of the block.
    """
    first = torch.tensor(n_new, device=wanted.device)
    first = first.scatter_reduce(0, wanted // width, wanted % width, reduce="amin")
    return [new - skipped for new, skipped in zip(n_new, first.tolist(), strict=True)]


def _look_fast(q: Tensor, keys: Tensor, values: Tensor, step: PackedRows) -> Tensor:
    end = max(step.ends)
    heads_first = (q.transpose(1, 2), keys[:, :end].transpose(1, 2), values[:, :end].transpose(1, 2))
    visible = step.visible(step.starts, q.shape[1], end)
    grouped = q.shape[2] != keys.shape[2]
    attended = F.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(2)


def _look_invariant(q: Tensor, keys: Tensor, values: Tensor, step: PackedRows) -> Tensor:
    """Piece by piece; undefined where a row has no query."""
    attended = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
    for piece in step.pieces:
        k, v = (_first_keys(stored[piece.rows], piece.n_keys) for stored in (keys, values))
        attended[piece.rows, piece.columns] = _look_at(q[piece.rows, piece.columns], k, v, piece.mask)
    return attended


def _rounded(n_keys: int) -> int:
    """The least number of keys, from this one on, whose last block is summed as a whole block is."""
    before = (n_keys - 1) // BLOCK * BLOCK
    last = -(-(n_keys - before) // KEYS) * KEYS
    return before + (BLOCK if last > CHAIN else last)


def _first_keys(stored: Tensor, n_keys: int) -> Tensor:
    """(B, S, K, D) -> (B, n_keys, K, D); with zeros behind where a cache was not made by `Packing.slots`."""
    missing = n_keys - stored.shape[1]
    return F.pad(stored, (0, 0, 0, 0, 0, missing)) if missing > 0 else stored[:, :n_keys]


def _look_at(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """(B, T, H, D) over (B, S, K, D) -> (B, T, H * D). Heads that share a key head ask as more queries of one head."""
    B, T, H, D = q.shape
    n_kv_head = keys.shape[2]
    shared = H // n_kv_head
    asking = q.view(B, T, n_kv_head, shared, D).permute(0, 2, 3, 1, 4).reshape(B, n_kv_head, shared * T, D)
    mask = mask if shared == 1 else mask.repeat(1, 1, shared, 1)
    found = F.scaled_dot_product_attention(asking, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
    return found.view(B, n_kv_head, shared, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)


FAST = Packing(multiple=1, least=1, slots=int, look=_look_fast, invariant=False)


def row_invariant(d_model: int, n_threads: int) -> Packing:
    """A row's numbers do not depend on its batch; see the top of this file.

    Args:
        d_model: narrowest activation of the model; elementwise operations on fewer elements than every thread has use
            fewer threads, whose shares then need not be whole vectors.
        n_threads: `torch.get_num_threads()`.
    """
    multiple = VECTOR * n_threads
    least = multiple if n_threads <= 2 else -(-GRAIN * (n_threads - 1) // d_model) + 1
    return Packing(multiple, least, _rounded, _look_invariant, invariant=True)
