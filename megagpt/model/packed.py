"""New tokens of several rows laid end to end beside a key-value cache: only attention sees rows and padding.

Two ways to run them. `FAST` takes PyTorch's kernels as they are: how many rows run together decides which kernels, so
that one row's numbers may differ in the last digits from batch to batch. `row_invariant` keeps them the same bit for
bit, whatever the row is batched with and however its tokens are split between cache and input:

- Matrix products, norms and activations see a number of packed tokens that is a multiple of 32 a thread. Measured with
  MKL: from there on a row of a product does not depend on the other rows, and no vectorised loop has a tail, whose
  scalar arithmetic would differ.
- Attention sums over keys in blocks of `KEYS`, from the first one on; blocks that a query does not see add exact zeros.
  (PyTorch's kernel sums over all keys of the batch at once, and the library below splits that sum by its length.)

That holds for one machine and one number of threads, in fp32 on a CPU; `evals` checks it before it relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from megagpt.model.layers import KVCache

KEYS = 128
"""Keys of one partial sum."""
QUERIES = 128
"""Queries that look at the cache together; keys behind the last one's are left out."""
QUERY_MULTIPLE = 4
"""Fewer queries than four are multiplied by another routine."""
VECTOR = 32
"""Elements that an unrolled vector loop takes at once (two of 16 fp32)."""
GRAIN = 32768
"""Elements below which PyTorch uses one thread for an elementwise operation (at::internal::GRAIN_SIZE)."""
SCORE_BYTES = 4 << 20
"""Memory of one piece of attention weights, in fp32, where a piece has more than one row: it should stay in a cache."""

Look = Callable[[Tensor, Tensor, Tensor, "PackedRows"], Tensor]
"""(B, T, H, D) queries over (B, S, K, D) keys and values -> (B, T, H * D)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How packed tokens are run."""

    multiple: int
    """Their number is filled up to a multiple of this."""
    least: int
    """And to this."""
    key_multiple: int
    look: Look
    invariant: bool
    """A row's numbers do not depend on its batch, nor on how its tokens are split over steps."""

    def filled(self, n: int) -> int:
        """Tokens to run so that `n` are."""
        return -(-max(n, self.least) // self.multiple) * self.multiple

    def fill(self, x: Tensor) -> Tensor:
        """(n, ...) -> (filled(n), ...), with zeros."""
        return F.pad(x, (0, 0) * (x.ndim - 1) + (0, self.filled(len(x)) - len(x)))


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

    def visible(self, rows: slice, first: int, n: int, keys: range) -> Tensor:
        """(b, 1, n, len(keys)) bool: where query `first + i` of these rows may look."""
        starts = torch.tensor(self.starts[rows], device=self.device)
        positions = starts[:, None] + torch.arange(first, first + n, device=self.device)
        return torch.arange(keys.start, keys.stop, device=self.device) <= positions[:, None, :, None]


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
    visible = step.visible(slice(None), 0, q.shape[1], range(end))
    grouped = q.shape[2] != keys.shape[2]
    attended = F.scaled_dot_product_attention(*heads_first, attn_mask=visible, enable_gqa=grouped)
    return attended.transpose(1, 2).flatten(2)


def _look_invariant(q: Tensor, keys: Tensor, values: Tensor, step: PackedRows) -> Tensor:
    """In pieces of rows and queries, of bounded memory; each sees the keys up to its own last one's block."""
    B, T, H, D = q.shape
    attended = q.new_empty(B, T, H * D)
    for first in range(0, T, QUERIES):
        n = min(QUERIES, T - first)
        start = 0
        while start < B:
            n_keys = _rounded(max(step.starts[start:]) + first + n)
            n_rows = max(1, SCORE_BYTES // (4 * H * n * n_keys))
            rows = slice(start, min(B, start + n_rows))
            n_keys = min(n_keys, _rounded(max(step.ends[rows])))
            seen_by_all = min(n_keys - 1, min(step.starts[rows]) + first)
            visible = step.visible(rows, first, n, range(seen_by_all, n_keys))
            found = _blocked(q[rows, first : first + n], keys[rows, :n_keys], values[rows, :n_keys], visible)
            attended[rows, first : first + n] = found
            start = rows.stop
    return attended


def _rounded(n_keys: int) -> int:
    return -(-n_keys // KEYS) * KEYS


def _blocked(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v, the last product summed block of keys by block of keys.

    Query heads that share a key head are rows of one product. `visible` is of the last keys, up to a whole block.
    """
    B, T, H, D = q.shape
    n_kv_head, n_keys = keys.shape[2], _rounded(keys.shape[1])
    batch, shared = B * n_kv_head, H // n_kv_head * T
    if keys.shape[1] < n_keys:  # a cache whose length is no multiple of the block
        keys, values = (F.pad(stored, (0, 0, 0, 0, 0, n_keys - stored.shape[1])) for stored in (keys, values))
    k, v = (stored.transpose(1, 2).reshape(batch, n_keys, D) for stored in (keys, values))
    grouped = (q * D**-0.5).transpose(1, 2).reshape(batch, shared, D)
    scores = torch.bmm(grouped, k.transpose(1, 2)).view(B, H, T, n_keys)
    scores[..., -visible.shape[-1] :].masked_fill_(~visible, float("-inf"))
    weights = scores.softmax(-1).view(batch, shared, n_keys)
    summed = torch.bmm(weights[..., :KEYS], v[:, :KEYS])
    for start in range(KEYS, n_keys, KEYS):
        summed.baddbmm_(weights[..., start : start + KEYS], v[:, start : start + KEYS])
    return summed.view(B, H, T, D).transpose(1, 2).flatten(2)


FAST = Packing(multiple=1, least=1, key_multiple=1, look=_look_fast, invariant=False)


def row_invariant(d_model: int, n_threads: int) -> Packing:
    """A row's numbers do not depend on its batch; see the top of this file.

    Args:
        d_model: narrowest activation of the model; elementwise operations on fewer elements than every thread has use
            fewer threads, whose shares then need not be whole vectors.
        n_threads: `torch.get_num_threads()`.
    """
    multiple = VECTOR * n_threads
    least = multiple if n_threads <= 2 else -(-GRAIN * (n_threads - 1) // d_model) + 1
    return Packing(multiple, least, KEYS, _look_invariant, invariant=True)
