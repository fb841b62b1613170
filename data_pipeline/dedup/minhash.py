r"""From UTF-8 text to content hash, MinHash signature and LSH band keys, in one compiled pass over the bytes.

    characters   lower case each by itself; runs of letters and digits are words, everything else separates
    content      words joined by one space -> xxh3_128; a text without any word: the text itself
    word         FNV-1a over the code points, then mixed
    shingle      polynomial over the last `ngram` words, then mixed
    minimum k    over all shingles x: min(a_k * x + b_k mod 2^64), its upper 32 bits
    band key     the band's number and its minima, mixed in turn

Source: Broder 1997, "On the resemblance and containment of documents" (the estimate); Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", chapter 3 (bands and rows); Dietzfelbinger 1996 (multiply-add, upper bits);
Fowler, Noll, Vo (FNV-1a). A document pair of Jaccard similarity s shares at least one of b bands of r rows with
probability 1 - (1 - s^r)^b.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numba
import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.shuffle import mix64
from megagpt.text.text_classes import N_CODE_POINTS, word_lower_case
from megagpt.text.word_hashes import mix

UInt8Array = NDArray[np.uint8]
UInt64Array = NDArray[np.uint64]
Int64Array = NDArray[np.int64]

_Function = TypeVar("_Function", bound=Callable[..., Any])

DEFINITION = 3
"""Number of the definition above; another one gives other hashes."""
SEED = 0x6D656761677074
_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
# Any odd number of good spectrum will do; this one is from PCG. Source: O'Neill 2014, section 6.2.3.
SHINGLE_BASE = 6364136223846793005
_BASE = np.uint64(SHINGLE_BASE)
_LARGEST = np.uint64(0xFFFFFFFFFFFFFFFF)
_BLOCK_SHINGLES = 2048
_SPACE = 32


def compiled(function: _Function) -> _Function:
    """Compile at the first call and keep the machine code beside the source; the lock of Python is let go."""
    return cast(_Function, numba.njit(cache=True, nogil=True)(function))


@functools.cache
def word_characters() -> NDArray[np.uint32]:
    r"""By code point: lower case where `\w` matches, but for `_`, and 0 elsewhere; (0x110000,), read only.

    Source: FineWeb was deduplicated with datatrove's TextNormConfig, for which `_` separates words as other signs do.
    """
    table = word_lower_case().copy()
    table[ord("_")] = 0
    table.flags.writeable = False
    return table


@dataclass(frozen=True)
class MinHasher:
    """`bands * rows` hash functions over word n-grams; equal parameters give equal band keys everywhere."""

    ngram: int
    bands: int
    rows: int

    def functions(self) -> tuple[UInt64Array, UInt64Array]:
        """Odd multipliers and offsets of the hash functions, (bands * rows,) each."""
        numbers = np.arange(1, 2 * self.bands * self.rows + 1, dtype=np.uint64) + np.uint64(SEED)
        mixed = mix64(numbers)
        return mixed[::2] | np.uint64(1), np.ascontiguousarray(mixed[1::2])


def parameters_of(hasher: MinHasher | None) -> dict[str, Any]:
    """What two jobs must have in common for their hashes to be comparable; part of the configuration of signatures."""
    return {"definition": DEFINITION, "minhash": None if hasher is None else dataclasses.asdict(hasher)}


@dataclass(frozen=True)
class Signed:
    """What was worked out for a batch of n texts."""

    content_hashes: list[int]
    """xxh3_128 of each normalised text."""
    n_words: Int64Array
    """(n,)."""
    minima: NDArray[np.uint32]
    """(n, bands * rows); meaningless where a text has fewer words than the n-gram."""
    band_keys: UInt64Array
    """(n, bands); likewise."""


class Signer:
    """The compiled pass with its tables; made once for a shard."""

    def __init__(self, hasher: MinHasher | None) -> None:
        """Without a hasher, only content hashes and numbers of words are worked out."""
        self._hasher = hasher or MinHasher(ngram=1, bands=0, rows=0)
        self._table = word_characters()
        self._multipliers, self._offsets = self._hasher.functions()
        self._normalised = np.empty(0, np.uint8)

    def sign(self, text: UInt8Array, ends: Int64Array) -> Signed:
        """Hash a batch of texts.

        Args:
            text: their UTF-8 bytes, one after the other.
            ends: (n + 1,), where each begins, and the end of the last.
        """
        n, hasher = len(ends) - 1, self._hasher
        if len(self._normalised) < _room_for(int(ends[-1] - ends[0])):
            self._normalised = np.empty(_room_for(int(ends[-1] - ends[0])), np.uint8)
        normalised_ends, n_words = np.zeros(n + 1, np.int64), np.zeros(n, np.int64)
        minima = np.empty((n, hasher.bands * hasher.rows), np.uint32)
        keys = np.empty((n, hasher.bands), np.uint64)
        functions = (self._multipliers, self._offsets)
        _sign_batch(
            text, ends, self._table, hasher.ngram, functions, (self._normalised, normalised_ends), n_words, minima
        )
        _band_keys(minima, keys)
        return Signed(self._content_hashes(text, ends, normalised_ends), n_words, minima, keys)

    def _content_hashes(self, text: UInt8Array, ends: Int64Array, normalised_ends: Int64Array) -> list[int]:
        raw, normalised = text.data, self._normalised.data
        bounds, raw_bounds = normalised_ends.tolist(), ends.tolist()
        return [
            xxhash.xxh3_128_intdigest(
                normalised[bounds[i] : bounds[i + 1]]
                if bounds[i + 1] > bounds[i]
                else raw[raw_bounds[i] : raw_bounds[i + 1]]
            )
            for i in range(len(raw_bounds) - 1)
        ]


def shingle_set(text: UInt8Array, ngram: int) -> UInt64Array:
    """The distinct shingle hashes of one text of UTF-8 bytes, sorted; empty if it has fewer than `ngram` words."""
    return np.unique(_all_shingles(text, word_characters(), ngram))


def _room_for(n_bytes: int) -> int:
    # The lower case of a character takes at most one and a half times its bytes: two may become three.
    return n_bytes + n_bytes // 2 + 4


@compiled
def _decode(text: UInt8Array, position: int, end: int) -> tuple[np.int64, int]:
    """The code point at `position` and how many bytes it takes; 0 for a sequence that the text cuts off."""
    first = np.int64(text[position])
    if first < 0x80:
        return first, 1
    length = 2 if first < 0xE0 else (3 if first < 0xF0 else 4)
    if position + length > end:
        return np.int64(0), end - position
    code = first & (0x7F >> length)
    for i in range(1, length):
        code = (code << 6) | (np.int64(text[position + i]) & 0x3F)
    return (code if code < N_CODE_POINTS else np.int64(0)), length


@compiled
def _encode(code: np.int64, out: UInt8Array, at: int) -> int:
    """Write a code point as UTF-8; where the next one goes."""
    if code < 0x80:
        out[at] = code
        return at + 1
    if code < 0x800:
        out[at] = 0xC0 | (code >> 6)
        out[at + 1] = 0x80 | (code & 0x3F)
        return at + 2
    if code < 0x10000:
        out[at] = 0xE0 | (code >> 12)
        out[at + 1] = 0x80 | ((code >> 6) & 0x3F)
        out[at + 2] = 0x80 | (code & 0x3F)
        return at + 3
    out[at] = 0xF0 | (code >> 18)
    out[at + 1] = 0x80 | ((code >> 12) & 0x3F)
    out[at + 2] = 0x80 | ((code >> 6) & 0x3F)
    out[at + 3] = 0x80 | (code & 0x3F)
    return at + 4


@compiled
def _power(exponent: int) -> np.uint64:
    power = np.uint64(1)
    for _ in range(exponent):
        power *= _BASE
    return power


@compiled
def _read_words(
    text: UInt8Array,
    span: tuple[int, int],
    table: NDArray[np.uint32],
    state: UInt64Array,
    ring: UInt64Array,
    block: UInt64Array,
    output: tuple[UInt8Array, int],
) -> tuple[int, int, int]:
    """Read on until the text ends or `block` is full; (position in the text, shingles in the block, in the buffer).

    Args:
        text: UTF-8 bytes.
        span: where to go on, where the document ends; one step past its end closes the last word.
        table: `word_characters`.
        state: (5,), zeros at the beginning: hash of the word being read, polynomial over the ring, number of words,
            whether inside a word, slot of the oldest word.
        ring: (ngram,), hashes of the last words; zeros at the beginning.
        block: takes the shingles.
        output: buffer for the normalised text, where to write on.
    """
    position, end = span
    normalised, written = output
    word, rolled, n_words, inside, slot = state[0], state[1], np.int64(state[2]), state[3] > 0, np.int64(state[4])
    ngram, power = len(ring), _power(len(ring))
    n_shingles = 0
    while position <= end and n_shingles < len(block):
        code, length = _decode(text, position, end) if position < end else (np.int64(0), 1)
        position += length
        character = table[code]
        if character != 0:
            if not inside:
                word, inside = _FNV_OFFSET, True
                if n_words > 0:
                    normalised[written] = _SPACE
                    written += 1
            word = (word ^ np.uint64(character)) * _FNV_PRIME
            written = _encode(np.int64(character), normalised, written)
        elif inside:
            inside = False
            newest = mix(word)
            rolled = rolled * _BASE + newest - ring[slot] * power
            ring[slot] = newest
            slot += 1
            if slot == ngram:
                slot = np.int64(0)
            n_words += 1
            if n_words >= ngram:
                block[n_shingles] = mix(rolled)
                n_shingles += 1
    state[0], state[1], state[2], state[3], state[4] = (
        word,
        rolled,
        np.uint64(n_words),
        np.uint64(inside),
        np.uint64(slot),
    )
    return position, n_shingles, written


@compiled
def _lower_minima(
    shingles: UInt64Array, n_shingles: int, multipliers: UInt64Array, offsets: UInt64Array, minima: UInt64Array
) -> None:
    """Lower `minima` by the hashes of shingles, four at a time so that the functions are loaded a quarter as often."""
    i = 0
    while i + 4 <= n_shingles:
        x0, x1, x2, x3 = shingles[i], shingles[i + 1], shingles[i + 2], shingles[i + 3]
        for k in range(len(minima)):
            a, b = multipliers[k], offsets[k]
            minima[k] = min(minima[k], min(min(x0 * a + b, x1 * a + b), min(x2 * a + b, x3 * a + b)))
        i += 4
    while i < n_shingles:
        for k in range(len(minima)):
            minima[k] = min(minima[k], shingles[i] * multipliers[k] + offsets[k])
        i += 1


@compiled
def _sign_batch(
    text: UInt8Array,
    ends: Int64Array,
    table: NDArray[np.uint32],
    ngram: int,
    functions: tuple[UInt64Array, UInt64Array],
    output: tuple[UInt8Array, Int64Array],
    n_words: Int64Array,
    minima: NDArray[np.uint32],
) -> None:
    """Fill `output` (normalised texts, where each begins), `n_words` and `minima`."""
    multipliers, offsets = functions
    normalised, normalised_ends = output
    block = np.empty(_BLOCK_SHINGLES, np.uint64)
    lowest = np.empty(len(multipliers), np.uint64)
    ring, state = np.empty(ngram, np.uint64), np.empty(5, np.uint64)
    written = 0
    for i in range(len(ends) - 1):
        lowest[:] = _LARGEST
        ring[:] = np.uint64(0)
        state[:] = np.uint64(0)
        position = ends[i]
        while position <= ends[i + 1]:
            span, rest = (position, ends[i + 1]), (normalised, written)
            position, n_shingles, written = _read_words(text, span, table, state, ring, block, rest)
            _lower_minima(block, n_shingles, multipliers, offsets, lowest)
        normalised_ends[i + 1] = written
        n_words[i] = np.int64(state[2])
        for k in range(len(lowest)):
            minima[i, k] = np.uint32(lowest[k] >> np.uint64(32))


@compiled
def _band_keys(minima: NDArray[np.uint32], keys: UInt64Array) -> None:
    """Two documents share a key only where they agree in the same band."""
    n_documents, bands = keys.shape
    rows = minima.shape[1] // bands if bands > 0 else 0
    for i in range(n_documents):
        for band in range(bands):
            key = mix(np.uint64(SEED + band))
            for k in range(band * rows, (band + 1) * rows):
                key = mix(key ^ np.uint64(minima[i, k]))
            keys[i, band] = key


@compiled
def _all_shingles(text: UInt8Array, table: NDArray[np.uint32], ngram: int) -> UInt64Array:
    """Every shingle hash of a text in its order; a word and what separates it take two bytes or more."""
    shingles = np.empty(len(text) // 2 + 1, np.uint64)
    normalised = np.empty(len(text) + len(text) // 2 + 4, np.uint8)
    ring, state = np.zeros(ngram, np.uint64), np.zeros(5, np.uint64)
    _, n_shingles, _ = _read_words(text, (0, len(text)), table, state, ring, shingles, (normalised, 0))
    return shingles[:n_shingles]
