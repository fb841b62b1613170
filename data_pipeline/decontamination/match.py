"""Finding the n-grams of benchmark items in a text: hashes of its words, a bitmap, then a binary search."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
from numpy.typing import NDArray

from data_pipeline.decontamination.index import FORMAT, INDEX_FILE
from data_pipeline.decontamination.ngram_table import BLOOM_FILE, HASHES_FILE, NUMBERS_FILE, OFFSETS_FILE
from megagpt.errors import DataError
from megagpt.text.ngrams import find_ngrams
from megagpt.text.word_hashes import UInt64Array, Words, hash_words


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
        found = find_ngrams(words.hashes, self.lengths, self.hashes, self.bloom)
        return self._hits(words, found) if found.shape[1] else []

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
