"""Document ids <-> the numbers 0 .. n - 1 of those documents that have an edge, without a table of ids.

One bit for each record of each shard says whether its document has an edge; the number of a document is the count of
bits before its own. With the counts a 64-bit word long, two bits a record of memory, whatever the edges.

Documents of this job come first, in rising id; published ones (negative ids) after them. So the smallest number of a
cluster is its smallest document of this job, if it has one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.minhash import compiled
from data_pipeline.dedup.signatures import SIGNATURES_FILE
from data_pipeline.parquet_reader import open_rows

Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]

_ORDINAL_SHIFT = 32
_RECORDS = (1 << _ORDINAL_SHIFT) - 1
_WORD_BITS = 64


class Nodes:
    """The bitmap: first `mark` all edges, then `number` once, then `of` and `ids`."""

    def __init__(self, signatures: Sequence[Path]) -> None:
        """Folders of signatures of all shards, published ones among them; their ordinals follow from the ids."""
        records = dict(filter(None, map(_ordinal_and_records, signatures)))
        self._n_own = 1 + max((ordinal for ordinal in records if ordinal >= 0), default=-1)
        n_published = max((-ordinal for ordinal in records if ordinal < 0), default=0)
        self.ordinals = [*range(self._n_own), *range(-n_published, 0)]
        """Of the shards, in the order of the bits; the published ones are where negative indices look for them."""
        words = [-(-records.get(ordinal, 0) // _WORD_BITS) for ordinal in self.ordinals]
        self._bases = np.cumsum([0, *words]).astype(np.int64)
        self._bits = np.zeros(int(self._bases[-1]), np.uint64)
        self._ranks = np.zeros(len(self._bits) + 1, np.int64)

    def mark(self, doc_ids: Int64Array) -> bool:
        """Say that documents have an edge; False if one of them is of no shard."""
        return bool(_mark(doc_ids, self._n_own, self._bases, self._bits))

    def number(self) -> int:
        """Count the bits; how many documents have an edge."""
        _count(self._bits, self._ranks)
        return int(self._ranks[-1])

    def of(self, doc_ids: Int64Array) -> Int64Array:
        """The numbers of documents, (n,); -1 for one without an edge."""
        return np.asarray(_numbers(doc_ids, self._n_own, self._bases, self._bits, self._ranks), np.int64)

    def ranges(self) -> Iterator[tuple[int, int, int]]:
        """Ordinal, first number and end of the numbers of each shard."""
        for i, ordinal in enumerate(self.ordinals):
            yield ordinal, int(self._ranks[self._bases[i]]), int(self._ranks[self._bases[i + 1]])

    def n_own(self) -> int:
        """How many documents of this job have an edge: they have the numbers below."""
        return int(self._ranks[self._bases[self._n_own]])

    def ids(self) -> Int64Array:
        """The document ids by number, (n,)."""
        result = np.empty(int(self._ranks[-1]), np.int64)
        for i, ordinal in enumerate(self.ordinals):
            begin, end = int(self._bases[i]), int(self._bases[i + 1])
            _ids(self._bits[begin:end], self._ranks[begin : end + 1], ordinal << _ORDINAL_SHIFT, result)
        return result


def _ordinal_and_records(folder: Path) -> tuple[int, int] | None:
    """The shard's ordinal and one more than its last record, by the statistics of the rising doc_id; None if empty."""
    with open_rows(folder / SIGNATURES_FILE) as file:
        if file.metadata.num_rows == 0:
            return None
        last = int(file.metadata.row_group(file.num_row_groups - 1).column(0).statistics.max)
    return last >> _ORDINAL_SHIFT, (last & _RECORDS) + 1


@compiled
def _shard_of(doc_id: int, n_shards: int, n_own: int) -> int:
    """The position of a document's shard, -1 if there is none of its ordinal."""
    ordinal = doc_id >> _ORDINAL_SHIFT
    if ordinal >= 0:
        return ordinal if ordinal < n_own else -1
    return ordinal + n_shards if ordinal + n_shards >= n_own else -1


@compiled
def _mark(doc_ids: Int64Array, n_own: int, bases: Int64Array, bits: UInt64Array) -> bool:
    for doc_id in doc_ids:
        shard = _shard_of(doc_id, len(bases) - 1, n_own)
        if shard < 0:
            return False
        record = doc_id & _RECORDS
        word = bases[shard] + (record >> 6)
        if word >= bases[shard + 1]:
            return False
        bits[word] |= np.uint64(1) << np.uint64(record & 63)
    return True


@compiled
def _ones(word: np.uint64) -> np.int64:
    """How many bits are set. Source: Knuth, TAOCP 4A, section 7.1.3, (62)."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@compiled
def _count(bits: UInt64Array, ranks: Int64Array) -> None:
    for i in range(len(bits)):
        ranks[i + 1] = ranks[i] + _ones(bits[i])


@compiled
def _numbers(doc_ids: Int64Array, n_own: int, bases: Int64Array, bits: UInt64Array, ranks: Int64Array) -> Int64Array:
    result = np.full(len(doc_ids), -1, np.int64)
    for i in range(len(doc_ids)):
        shard = _shard_of(doc_ids[i], len(bases) - 1, n_own)
        if shard < 0:
            continue
        record = doc_ids[i] & _RECORDS
        word = bases[shard] + (record >> 6)
        mask = np.uint64(1) << np.uint64(record & 63)
        if word < bases[shard + 1] and bits[word] & mask != 0:
            result[i] = ranks[word] + _ones(bits[word] & (mask - np.uint64(1)))
    return result


@compiled
def _ids(bits: UInt64Array, ranks: Int64Array, first_id: int, result: Int64Array) -> None:
    for i in range(len(bits)):
        number, word = ranks[i], bits[i]
        for bit in range(_WORD_BITS):
            if (word >> np.uint64(bit)) & np.uint64(1) != 0:
                result[number] = first_id + i * _WORD_BITS + bit
                number += 1
