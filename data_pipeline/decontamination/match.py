"""Finding the n-grams of benchmark items in a text: hashes of its words, a bitmap, then a binary search."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
import orjson
from numpy.typing import NDArray

from data_pipeline.decontamination.index import FORMAT, INDEX_FILE
from data_pipeline.decontamination.ngram_table import BLOOM_FILE, HASHES_FILE, NUMBERS_FILE, OFFSETS_FILE
from data_pipeline.word_hashes import BASE, UInt64Array, Words, hash_words, mix
from megagpt.errors import DataError

_FIRST_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that benchmark items share with a text: n-grams that overlap or touch are one passage."""

    start: int
    """First character."""
    end: int
    """Character after the last."""
    ngrams: tuple[int, ...]
    """The different n-grams in it, as positions in the index, rising."""
    items: tuple[int, ...]
    """Rows of items.parquet that have one of them, rising."""


@dataclass(frozen=True)
class Index:
    """An index of benchmark items, mapped from its files: workers of a machine share one copy."""

    lengths: NDArray[np.int64]
    """Words of the n-grams in it, each length once."""
    hashes: UInt64Array
    offsets: NDArray[np.int64]
    item_numbers: NDArray[np.int32]
    bloom: NDArray[np.uint8]

    @classmethod
    def open(cls, folder: Path) -> Index:
        """The index that stage `benchmarks` wrote.

        Raises:
            DataError: there is none, or of another format.
        """
        try:
            content = orjson.loads((folder / INDEX_FILE).read_bytes())
            arrays = [np.load(folder / name, mmap_mode="r") for name in (HASHES_FILE, OFFSETS_FILE, NUMBERS_FILE)]
            bloom = np.load(folder / BLOOM_FILE, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: no index of benchmark items: {error}; run the job's stage `benchmarks`"
            ) from None
        if content.get("format") != FORMAT:
            raise DataError(f"{folder}: index of format {content.get('format')}, expected {FORMAT}; run the job again")
        # Plain arrays over the mapped memory: the compiled loops know no other type.
        hashes, offsets, numbers, bits = (np.asarray(array) for array in (*arrays, bloom))
        return cls(np.array(content["lengths"], np.int64), hashes, offsets, numbers, bits)

    def find(self, text: str) -> list[Hit]:
        """The passages of `text` that items share with it, in order and without overlap."""
        words = hash_words(text)
        capacity = _FIRST_CAPACITY
        while True:
            found = np.empty((3, capacity), np.int64)
            n_found = _search(words.hashes, self.lengths, self.hashes, self.bloom, found)
            if n_found <= capacity:
                break
            capacity = n_found
        return self._hits(words, found[:, :n_found]) if n_found else []

    def _hits(self, words: Words, found: NDArray[np.int64]) -> list[Hit]:
        """Passages out of the n-grams' first and last words and numbers, (3, n)."""
        first, last, ngrams = found
        order = np.lexsort((ngrams, last, first))
        first, last, ngrams = first[order], last[order], ngrams[order]
        reach = np.maximum.accumulate(last)
        cuts = [0, *(np.flatnonzero(first[1:] > reach[:-1]) + 1).tolist(), len(first)]
        return [
            self._hit(int(words.starts[first[a]]), int(words.ends[reach[b - 1]]), np.unique(ngrams[a:b]))
            for a, b in itertools.pairwise(cuts)
        ]

    def count(self, hits: list[Hit]) -> list[tuple[int, int]]:
        """(item, number of its different n-grams in the hits), by item: the rows of one document's contamination."""
        ngrams = sorted({ngram for hit in hits for ngram in hit.ngrams})
        if not ngrams:
            return []
        items, counts = np.unique(np.concatenate([self._items(ngram) for ngram in ngrams]), return_counts=True)
        return list(zip(items.tolist(), counts.tolist(), strict=True))

    def _items(self, ngram: int) -> NDArray[np.int32]:
        return self.item_numbers[self.offsets[ngram] : self.offsets[ngram + 1]]

    def _hit(self, start: int, end: int, ngrams: NDArray[np.int64]) -> Hit:
        items = np.unique(np.concatenate([self._items(ngram) for ngram in ngrams]))
        return Hit(start, end, tuple(ngrams.tolist()), tuple(items.tolist()))


@numba.njit(cache=True, nogil=True)
def _search(
    words: UInt64Array,
    lengths: NDArray[np.int64],
    known: UInt64Array,
    bloom: NDArray[np.uint8],
    found: NDArray[np.int64],
) -> int:
    """Fill `found` with first word, last word and number of each n-gram, as far as it goes; how many there are."""
    bits = np.uint64(0)
    while (np.uint64(1) << bits) < np.uint64(8 * len(bloom)):
        bits += np.uint64(1)
    down, low = np.uint64(64) - bits, (np.uint64(1) << bits) - np.uint64(1)
    base = np.uint64(BASE)
    n_found = 0
    for length in lengths:
        leaving, value = np.uint64(1), np.uint64(0)
        for _ in range(length):
            leaving = leaving * base
        for i in range(len(words)):
            value = value * base + words[i]
            if i >= length:
                value = value - leaving * words[i - length]
            if i < length - 1:
                continue
            ngram = mix(value ^ np.uint64(length))
            if not (_is_set(bloom, ngram >> down) and _is_set(bloom, ngram & low)):
                continue
            place = np.searchsorted(known, ngram)
            if place < len(known) and known[place] == ngram:
                if n_found < found.shape[1]:
                    found[0, n_found], found[1, n_found], found[2, n_found] = i - length + 1, i, place
                n_found += 1
    return n_found


@numba.njit(cache=True, nogil=True, inline="always")
def _is_set(bitmap: NDArray[np.uint8], bit: np.uint64) -> bool:
    return bool((bitmap[bit >> np.uint64(3)] >> np.uint8(bit & np.uint64(7))) & np.uint8(1))
