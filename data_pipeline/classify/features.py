r"""Features of a text: runs of words, and runs of characters, hashed into a fixed number of buckets.

Source: Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning"; Joulin et al. 2016, "Bag of Tricks
for Efficient Text Classification", section 2 (word n-grams in hashed buckets).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megagpt.text.text_classes import word_lower_case
from megagpt.text.word_hashes import UInt64Array, code_points, hash_words, mix, ngram_hashes

UInt32Array = NDArray[np.uint32]

_SPACE = 32
_OF_CHARACTERS = 1 << 32
"""Added to a character run's length, so that it has no hash in common with a run of words."""


@dataclass(frozen=True, slots=True)
class FeatureSettings:
    """What a text is turned into; a model is of use only with the settings that it was trained with."""

    ngrams: int = 2
    """Runs of 1 to so many words."""
    characters: int = 0
    """Runs of so many characters, white space and signs counted as one space; 0: none. For scripts without spaces, and
    for words spelled in disguise, 4 or 5."""
    buckets: int = 20
    """Two to the power of this is the number of weights."""
    max_characters: int = 10_000
    """Characters of a text that are looked at, from its beginning; 0: all."""


def text_features(text: str, settings: FeatureSettings) -> UInt32Array:
    """The bucket of every feature of a text, with repetitions; (n,), empty for a text without words."""
    if settings.max_characters:
        text = text[: settings.max_characters]
    words = hash_words(text).hashes
    parts = [_buckets(ngram_hashes(words, length), settings.buckets) for length in range(1, settings.ngrams + 1)]
    if settings.characters:
        parts.append(_buckets(_character_runs(text, settings.characters), settings.buckets))
    return np.concatenate(parts)


def _buckets(hashes: UInt64Array, bits: int) -> UInt32Array:
    return (hashes >> np.uint64(64 - bits)).astype(np.uint32)


def _character_runs(text: str, length: int) -> UInt64Array:
    codes = code_points(text)
    out = np.empty(len(codes) + 2, np.uint64)
    spelled = np.empty(len(codes) + 2, np.uint32)
    n_found = _runs(codes, word_lower_case(), length, spelled, out)
    return out[:n_found]


@numba.njit(cache=True, nogil=True)
def _runs(codes: NDArray[Any], table: UInt32Array, length: int, spelled: UInt32Array, out: UInt64Array) -> int:
    """Hashes of runs over the words in lower case with one space before, between and after them."""
    size = 1
    spelled[0] = _SPACE
    for code in codes:
        letter = table[code]
        if letter or spelled[size - 1] != _SPACE:
            spelled[size] = letter or np.uint32(_SPACE)
            size += 1
    if spelled[size - 1] != _SPACE:
        spelled[size] = _SPACE
        size += 1
    n_runs = max(0, size - length + 1) if size > 1 else 0
    for i in range(n_runs):
        value = np.uint64(_OF_CHARACTERS + length)
        for j in range(length):
            value = mix(value ^ np.uint64(spelled[i + j]))
        out[i] = value
    return n_runs
