"""Which runs of words stand for a benchmark item, and the search for them in a text's words.

Which n-grams of an item count follows from the words of its longest text:

    at least `ngram` (13)   every 13-gram of it and of its other texts. Source: Brown et al. 2020, appendix C
    8 to 12                 every 8-gram; 8 is the shortest overlap that Brown et al. 2020 (table C.1) look at
    5 to 7                  the whole text: a shorter one, `What is an atom?`, is anyone's sentence
    fewer                   cannot be told from ordinary language: the item is not matchable

A further text of an item that is too short for the item's n, such as the question without its answer, counts whole
where it has 8 words or more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megagpt.text.word_hashes import BASE, UInt64Array, hash_words, mix, ngram_hashes

NGRAM = 13
"""Words of an overlap that counts. Source: Brown et al. 2020, appendix C."""
SHORT_NGRAM = 8
LEAST_WORDS = 5

MAX_ITEMS = 10
"""An n-gram that more items of one task share is the task's wording (`choose the option that best ...`) and not an
item's. Brown et al. 2020, appendix C, ignore 13-grams in more than ten documents for a like reason."""

_BLOOM_BITS_A_NGRAM = 16
_LEAST_BLOOM_BITS = 10
_FIRST_CAPACITY = 64


@dataclass(frozen=True, slots=True)
class ItemNgrams:
    """What an item is found by."""

    how: str
    """`13-gram`, `8-gram`, `whole`, or `too short`."""
    n_words: int
    """Of its longest text."""
    hashes: UInt64Array
    """Its different n-grams, rising; none where it is too short."""
    lengths: frozenset[int]
    """Words of these n-grams."""


def item_ngrams(texts: Sequence[str], ngram: int = NGRAM) -> ItemNgrams:
    """The n-grams of an item, by the rule above; `texts` holds at least one."""
    words = [hash_words(text).hashes for text in texts]
    longest = max(len(one) for one in words)
    used, how = _length(longest, ngram)
    if used == 0:
        return ItemNgrams("too short", longest, np.empty(0, np.uint64), frozenset())
    lengths = [used if len(one) >= used else len(one) for one in words]
    counted = [(one, n) for one, n in zip(words, lengths, strict=True) if len(one) >= used or len(one) >= SHORT_NGRAM]
    hashes = np.unique(np.concatenate([ngram_hashes(one, n) for one, n in counted]))
    return ItemNgrams(how, longest, hashes, frozenset(n for _, n in counted))


def bloom_bytes(n_ngrams: int) -> int:
    """Bytes of a bitmap of 16 to 32 bits for each n-gram; a power of two."""
    return (1 << max(_LEAST_BLOOM_BITS, (max(1, _BLOOM_BITS_A_NGRAM * n_ngrams) - 1).bit_length())) // 8


def set_bloom_bits(bloom: NDArray[Any], hashes: UInt64Array) -> None:
    """Set two bits of each hash: one numbered by its upper bits, one by its lower ones."""
    bits = (8 * len(bloom)).bit_length() - 1
    for places in (hashes >> np.uint64(64 - bits), hashes & np.uint64((1 << bits) - 1)):
        bit = np.left_shift(1, places & np.uint64(7)).astype(np.uint8)
        np.bitwise_or.at(bloom, places >> np.uint64(3), bit)


def find_ngrams(
    words: UInt64Array, lengths: NDArray[np.int64], known: UInt64Array, bloom: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """Where known n-grams stand in a text.

    Args:
        words: (w,) hashes of the text's words.
        lengths: words of the n-grams that are looked for, each length once.
        known: (k,) hashes of n-grams, rising.
        bloom: of `known`.

    Returns:
        (3, n): first word, last word, place in `known`, of each n-gram that is there.
    """
    capacity = _FIRST_CAPACITY
    while True:
        found = np.empty((3, capacity), np.int64)
        n_found = _search(words, lengths, known, bloom, found)
        if n_found <= capacity:
            return found[:, :n_found]
        capacity = n_found


def _length(n_words: int, ngram: int) -> tuple[int, str]:
    """Words of an item's n-grams; 0 where it cannot be matched."""
    if n_words >= ngram:
        return ngram, f"{ngram}-gram"
    if n_words >= SHORT_NGRAM:
        return SHORT_NGRAM, f"{SHORT_NGRAM}-gram"
    if n_words >= LEAST_WORDS:
        return n_words, "whole"
    return 0, "too short"


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
