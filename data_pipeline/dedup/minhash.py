"""MinHash signatures and LSH band keys of normalised texts, in vectorised numpy.

Source: Broder 1997, "On the resemblance and containment of documents" (the estimate); Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", chapter 3 (bands and rows). A document pair of Jaccard similarity s shares at least one
of b bands of r rows with probability 1 - (1 - s^r)^b.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

WORDS = re.compile(r"\w+")

_SEED = 0x6D656761677074
_MAX_WORDS_KNOWN = 1_000_000
# Odd 64-bit multipliers of splitmix64's finaliser. Source: Steele, Lea, Flood 2014.
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

UInt64Array = NDArray[np.uint64]


def normalise(text: str) -> str:
    r"""Lower-case `\w+` tokens joined by one space: what exact duplicates are equal in, and shingles are cut from."""
    return " ".join(WORDS.findall(text.lower()))


def mix64(values: UInt64Array) -> UInt64Array:
    """The finaliser of splitmix64, a bijection on 64-bit numbers. Source: Steele, Lea, Flood 2014, figure 16."""
    mixed = (values ^ (values >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class MinHasher:
    """`bands * rows` hash functions over word n-grams; equal parameters give equal signatures everywhere."""

    ngram: int
    bands: int
    rows: int

    def signatures(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """The documents that have at least `ngram` words, and their minima.

        Args:
            texts: normalised texts.

        Returns:
            positions in `texts`, (n,), and signatures, (n, bands * rows).
        """
        words = [_word_hashes(text) for text in texts]
        long_enough = np.array([i for i, w in enumerate(words) if len(w) >= self.ngram], np.int64)
        if not len(long_enough):
            return long_enough, np.empty((0, self.bands * self.rows), np.uint32)
        shingles = [_shingles(words[i], self.ngram) for i in long_enough]
        starts = np.cumsum([0, *(len(s) for s in shingles[:-1])])
        return long_enough, self._minima(np.concatenate(shingles), starts)

    def _minima(self, shingles: UInt64Array, starts: NDArray[np.int64]) -> NDArray[np.uint32]:
        multipliers, offsets = self._functions()
        result = np.empty((len(starts), self.bands * self.rows), np.uint32)
        hashed = np.empty_like(shingles)
        for k in range(self.bands * self.rows):
            np.multiply(shingles, multipliers[k], out=hashed)
            np.add(hashed, offsets[k], out=hashed)
            # The upper half of a multiply-add is the well mixed one; the smallest 64-bit value has the smallest half.
            result[:, k] = np.minimum.reduceat(hashed, starts) >> np.uint64(32)
        return result

    def _functions(self) -> tuple[UInt64Array, UInt64Array]:
        numbers = np.arange(1, 2 * self.bands * self.rows + 1, dtype=np.uint64) + np.uint64(_SEED)
        mixed = mix64(numbers)
        return mixed[::2] | np.uint64(1), mixed[1::2]

    def band_keys(self, signatures: NDArray[np.uint32]) -> UInt64Array:
        """Per document and band the xxh3_64 of the band's minima, seeded by the band's number.

        Two documents share a key only where they agree in the same band.

        Args:
            signatures: (n, bands * rows).

        Returns:
            (n, bands).
        """
        keys = np.empty((len(signatures), self.bands), np.uint64)
        for band in range(self.bands):
            rows = np.ascontiguousarray(signatures[:, band * self.rows : (band + 1) * self.rows], "<u4")
            keys[:, band] = [xxhash.xxh3_64_intdigest(row.tobytes(), seed=band) for row in rows]
        return keys


class _KnownWords(dict[str, int]):
    """Word -> xxh3_64, each computed once: a few thousand words make up most of any text."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_WORDS_KNOWN:
            self.clear()
        value = self[word] = xxhash.xxh3_64_intdigest(word.encode())
        return value


_KNOWN_WORDS = _KnownWords()


def _word_hashes(normalised: str) -> UInt64Array:
    words = normalised.split(" ") if normalised else []
    return np.fromiter(map(_KNOWN_WORDS.__getitem__, words), np.uint64, len(words))


def _shingles(words: UInt64Array, ngram: int) -> UInt64Array:
    """One hash for each window of `ngram` words, sensitive to their order."""
    n_windows = len(words) - ngram + 1
    rolled = np.full(n_windows, ngram, np.uint64)
    for j in range(ngram):
        rolled = mix64(rolled ^ words[j : j + n_windows])
    return rolled
