r"""The words of a text as 64-bit hashes with their places, and hashes of runs of words, in compiled loops.

A word is a run of `\w` characters, each in lower case (see `text_classes.lower_case`): the words that deduplication
compares, found without making a string of each. A run of words of a text equals one of 10^7 known hashes by chance with
probability 10^7 / 2^64, once in 10^12 words of text: no hit is checked again letter by letter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megagpt.text.text_classes import word_lower_case

UInt64Array = NDArray[np.uint64]
Int32Array = NDArray[np.int32]

BASE = 0x9E3779B97F4A7C13
"""Multiplier of the polynomial over word hashes modulo 2^64. It is 3 modulo 8, so that BASE^k - 1 has few factors of
two and exchanged words give another value: for words eight places apart, 2^5, which leaves 59 of 64 bits."""

# FNV-1a's start and prime. Source: Fowler, Noll, Vo, draft-eastlake-fnv, section 5.
_FNV_START = 0xCBF29CE484222325
_FNV_PRIME = 0x100000001B3
# splitmix64's finaliser. Source: Steele, Lea, Flood 2014, figure 16.
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one text in order."""

    hashes: UInt64Array
    """(n,)."""
    starts: Int32Array
    """(n,) characters of the text before each word."""
    ends: Int32Array
    """(n,) characters of the text up to each word's end."""

    def __len__(self) -> int:
        return len(self.hashes)


def hash_words(text: str) -> Words:
    """Hash every word of a text."""
    codes = code_points(text)
    # At most every other character begins a word; memory that is not written to is not taken.
    most = len(codes) // 2 + 1
    hashes, starts, ends = np.empty(most, np.uint64), np.empty(most, np.int32), np.empty(most, np.int32)
    n_words = _fill(codes, word_lower_case(), hashes, starts, ends)
    return Words(hashes[:n_words], starts[:n_words], ends[:n_words])


def ngram_hashes(hashes: UInt64Array, ngram: int) -> UInt64Array:
    """One hash for each run of `ngram` words, sensitive to their order and number.

    Args:
        hashes: (n,) of words.
        ngram: words in a run, at least 1.

    Returns:
        (n - ngram + 1,), empty for fewer words than `ngram`.
    """
    out = np.empty(max(0, len(hashes) - ngram + 1), np.uint64)
    if len(out):
        _roll(hashes, ngram, out)
    return out


def code_points(text: str) -> NDArray[Any]:
    """(n,): a text's characters as numbers; uint8 for a text in ASCII, which costs a quarter, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@numba.njit(cache=True, nogil=True, inline="always")
def mix(value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 - compiled for uint64
    """splitmix64's finaliser on one uint64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MIX_1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MIX_2)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _fill(
    codes: NDArray[Any], table: NDArray[np.uint32], hashes: UInt64Array, starts: Int32Array, ends: Int32Array
) -> int:
    n_words = 0
    inside = False
    value = np.uint64(0)
    for i in range(len(codes)):
        code = table[codes[i]]
        if code:
            if not inside:
                value = np.uint64(_FNV_START)
                starts[n_words] = i
                inside = True
            value = (value ^ np.uint64(code)) * np.uint64(_FNV_PRIME)
        elif inside:
            hashes[n_words] = mix(value)
            ends[n_words] = i
            n_words += 1
            inside = False
    if inside:
        hashes[n_words] = mix(value)
        ends[n_words] = len(codes)
        n_words += 1
    return n_words


@numba.njit(cache=True, nogil=True)
def _roll(hashes: UInt64Array, ngram: int, out: UInt64Array) -> None:
    base = np.uint64(BASE)
    leaving = np.uint64(1)
    value = np.uint64(0)
    for i in range(ngram):
        value = value * base + hashes[i]
        leaving = leaving * base
    length = np.uint64(ngram)
    out[0] = mix(value ^ length)
    for i in range(ngram, len(hashes)):
        value = value * base + hashes[i] - leaving * hashes[i - ngram]
        out[i - ngram + 1] = mix(value ^ length)
