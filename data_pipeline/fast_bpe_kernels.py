r"""Compiled loops of `fast_bpe`: cut UTF-8 into pieces, look each up, merge the bytes of those that are new.

A table is an open-addressing hash table from bytes to tokens. A row of four words holds a key and its tokens, so that
most look-ups touch one line of the processor's cache:

    word 0, 1    the bytes themselves, up to 16; of longer keys a hash, and where the bytes lie in `keys`
    word 2       number of bytes, number of tokens << 16, first token << 32; 0: an empty row
    word 3       second token, third << 32; of more tokens than three where the others lie in `tokens`

Every hit is compared byte by byte: no two keys are ever taken for each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.code_points import code_point_at
from megagpt.text.word_hashes import mix

UInt8Array = NDArray[np.uint8]
UInt32Array = NDArray[np.uint32]
UInt64Array = NDArray[np.uint64]
Int64Array = NDArray[np.int64]

OTHER, LETTER, NUMBER, SPACE = 0, 1, 2, 3
"""Classes of characters, of which every character has one."""
LONGEST_CACHED = 64
"""Bytes: longer pieces hardly come again."""
LONGEST_MERGED = 512
"""Bytes: the time of the merging below grows as the square; longer pieces are left to the caller."""

_NONE = np.uint32(0xFFFFFFFF)
_INLINE_BYTES = 16
_INLINE_TOKENS = 3
_BASE = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio in 64 bits, splitmix64's increment
_LOW_16 = np.uint64(0xFFFF)
_LOW_32 = np.uint64(0xFFFFFFFF)
_APOSTROPHE, _BLANK = 0x27, 0x20
_LETTERS_DEMST = 1 << 0x04 | 1 << 0x0D | 1 << 0x13 | 1 << 0x14  # d, m, s, t as bits of a letter's lower five
_E, _L, _R, _V = ord("e"), ord("l"), ord("r"), ord("v")


class Table(NamedTuple):
    """A hash table from bytes to tokens; see above."""

    rows: UInt64Array
    """(a power of two, 4)."""
    keys: UInt8Array
    tokens: UInt32Array
    used: Int64Array
    """(3,): rows, bytes of `keys`, items of `tokens`."""


class Splitting(NamedTuple):
    """How text is cut into pieces."""

    classes: UInt8Array
    """(0x110000,): class of each character."""
    digits: int
    """At most so many numbers make a piece, without the space before them; 0: any, with it."""


@numba.njit(cache=True, nogil=True)
def fill_vocabulary(data: UInt8Array, ends: Int64Array, ids: UInt32Array, table: Table) -> None:
    """Put token i, the bytes from ends[i] to ends[i + 1], into a table with room for all."""
    for i in range(len(ids)):
        _insert(data, (ends[i], ends[i + 1]), table, ids, (i, i + 1))


@numba.njit(cache=True, nogil=True)
def encode_texts(
    text: UInt8Array,
    ends: Int64Array,
    splitting: Splitting,
    vocabulary: Table,
    cache: Table,
    separator: np.uint32,
    output: tuple[UInt32Array, Int64Array, Int64Array],
) -> tuple[int, int]:
    """Tokens of each text, and the separator after each.

    Args:
        text: UTF-8 bytes.
        ends: (n + 1,) where text i begins and ends.
        splitting: how it is cut into pieces.
        vocabulary: bytes -> token, of which the lower is merged first.
        cache: pieces that were seen before -> tokens; emptied when full.
        separator: written after each text.
        output: room for a token a byte and a text, and two; (n,) tokens a text; (n, 4) text, place among the tokens,
            begin and end of the pieces that were left out because they are longer than LONGEST_MERGED.

    Returns:
        (tokens, pieces left out).
    """
    tokens, lengths, left_out = output
    room = LONGEST_MERGED + 1
    scratch = (np.empty(room, np.uint32), np.empty(room, np.uint32), np.empty(room, np.int64))
    rows, keys, further = cache.rows, cache.keys, cache.tokens
    n_tokens = n_left_out = int(ends[0]) * 0  # a literal 0 would have the loops below compiled twice
    for i in range(len(ends) - 1):
        at, end, before = ends[i], ends[i + 1], n_tokens
        while at < end:
            stop = piece_end(text, at, end, splitting)
            if stop - at <= LONGEST_CACHED:
                first, second = _key_of(text, at, stop)
                row = _row_of(text, at, stop, first, second, rows, keys)
                facts = rows[row, 2]
                if facts != np.uint64(0):
                    n_tokens = _copy(facts, rows[row, 3], further, tokens, n_tokens)
                else:
                    n_tokens = _learn(text, at, stop, vocabulary, cache, scratch, tokens, n_tokens)
            elif stop - at <= LONGEST_MERGED:
                n_tokens = _merge(text, at, stop, vocabulary, scratch, tokens, n_tokens)
            else:
                left_out[n_left_out, 0], left_out[n_left_out, 1] = i, n_tokens
                left_out[n_left_out, 2], left_out[n_left_out, 3] = at, stop
                n_left_out += 1
            at = stop
        tokens[n_tokens] = separator
        n_tokens += 1
        lengths[i] = n_tokens - before
    return n_tokens, n_left_out


@numba.njit(cache=True, nogil=True)
def piece_end(text: UInt8Array, at: int, end: int, splitting: Splitting) -> int:
    r"""Where the piece that begins at byte `at` ends, in a text that ends at byte `end`.

    `'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s`, its parts in this order. With
    `splitting.digits`, numbers are cut out beforehand: ` ?\p{N}++` becomes `\p{N}{1,digits}+`, and white space before
    a number is as if it stood at the end: `\s++(?=\p{N}|$)`.
    """
    classes, digits = splitting
    kind = _class_at(text, at, classes)[0]
    if text[at] == _APOSTROPHE:
        contraction = _contraction(text, at, end)
        if contraction > 0:
            return at + contraction
    elif text[at] == _BLANK and at + 1 < end:
        following = _class_at(text, at + 1, classes)[0]
        if following != SPACE and (following != NUMBER or digits == 0):
            at, kind = at + 1, following
    if kind == SPACE:
        return _space_end(text, at, end, splitting)
    limit = digits if kind == NUMBER and digits > 0 else end - at
    while at < end and limit > 0:
        following, width = _class_at(text, at, classes)
        if following != kind:
            break
        at += width
        limit -= 1
    return at


@numba.njit(cache=True, nogil=True)
def _space_end(text: UInt8Array, at: int, end: int, splitting: Splitting) -> int:
    """White space up to the end of the text; before anything else all but its last character, if there are others."""
    begin = last = at
    following = SPACE
    while at < end:
        following, width = _class_at(text, at, splitting.classes)
        if following != SPACE:
            break
        last = at
        at += width
    if at == end or last == begin or (following == NUMBER and splitting.digits > 0):
        return at
    return last


@numba.njit(cache=True, nogil=True)
def _contraction(text: UInt8Array, at: int, end: int) -> int:
    """Bytes of `'(?:[sdmt]|ll|ve|re)` at an apostrophe; 0: there is none."""
    if at + 1 >= end:
        return 0
    letter = int(text[at + 1])
    if letter >> 5 == 3 and (_LETTERS_DEMST >> (letter & 31)) & 1:
        return 2
    if at + 2 < end:
        second = text[at + 2]
        if (letter == _L and second == _L) or (letter in (_V, _R) and second == _E):
            return 3
    return 0


@numba.njit(cache=True, nogil=True)
def _class_at(text: UInt8Array, at: int, classes: UInt8Array) -> tuple[int, int]:
    """(class, bytes) of the character at byte `at`."""
    if text[at] < 0x80:
        return int(classes[text[at]]), 1
    code, width = code_point_at(text, at)
    return int(classes[code]), width


@numba.njit(cache=True, nogil=True, inline="always")
def _copy(facts: np.uint64, others: np.uint64, further: UInt32Array, out: UInt32Array, place: int) -> int:
    """Write the tokens of a row's words 2 and 3; where the next ones go. There must be room for three."""
    n_tokens = int((facts >> np.uint64(16)) & _LOW_16)
    out[place] = facts >> np.uint64(32)
    if n_tokens <= _INLINE_TOKENS:
        out[place + 1] = others & _LOW_32
        out[place + 2] = others >> np.uint64(32)
    else:
        begin = int(others)
        for i in range(n_tokens - 1):
            out[place + 1 + i] = further[begin + i]
    return place + n_tokens


@numba.njit(cache=True, nogil=True)
def _learn(
    text: UInt8Array,
    at: int,
    stop: int,
    vocabulary: Table,
    cache: Table,
    scratch: tuple[UInt32Array, UInt32Array, Int64Array],
    out: UInt32Array,
    place: int,
) -> int:
    """Write the tokens of a piece and put them into the cache; where the next ones go."""
    end = _merge(text, at, stop, vocabulary, scratch, out, place)
    if _is_full(cache):
        for i in range(len(cache.rows)):
            cache.rows[i, 2] = np.uint64(0)
        for i in range(3):
            cache.used[i] = 0
    _insert(text, (at, stop), cache, out, (place, end))
    return end


@numba.njit(cache=True, nogil=True)
def _merge(
    text: UInt8Array,
    at: int,
    stop: int,
    vocabulary: Table,
    scratch: tuple[UInt32Array, UInt32Array, Int64Array],
    out: UInt32Array,
    place: int,
) -> int:
    """Write the tokens of a piece, merging the pair whose bytes are the lowest token, the leftmost of equal ones.

    Returns where the next tokens go.

    Source: Sennrich et al. 2016, algorithm 1, on bytes; a piece that is a token is that token whatever the merges say,
    and pairs are ranked by their bytes, as in tiktoken's lib.rs, byte_pair_encode.
    """
    rows, keys = vocabulary.rows, vocabulary.keys
    whole = _token_of(text, at, stop, rows, keys)
    if whole != _NONE:
        out[place] = whole
        return place + 1
    ids, pairs, starts = scratch
    n_parts = stop - at
    for i in range(n_parts):
        starts[i] = at + i
        ids[i] = _token_of(text, at + i, at + i + 1, rows, keys)
        pairs[i] = _token_of(text, at + i, at + i + 2, rows, keys) if i + 1 < n_parts else _NONE
    starts[n_parts] = stop
    while True:
        best, lowest = 0, _NONE
        for i in range(n_parts - 1):
            if pairs[i] < lowest:
                best, lowest = i, pairs[i]
        if lowest == _NONE:
            break
        ids[best] = lowest
        n_parts -= 1
        for i in range(best + 1, n_parts):
            starts[i], ids[i], pairs[i] = starts[i + 1], ids[i + 1], pairs[i + 1]
        starts[n_parts] = stop
        pairs[best] = _token_of(text, starts[best], starts[best + 2], rows, keys) if best + 1 < n_parts else _NONE
        if best > 0:
            pairs[best - 1] = _token_of(text, starts[best - 1], starts[best + 1], rows, keys)
    for i in range(n_parts):
        out[place + i] = ids[i]
    return place + n_parts


@numba.njit(cache=True, nogil=True)
def _token_of(text: UInt8Array, at: int, stop: int, rows: UInt64Array, keys: UInt8Array) -> np.uint32:
    """The token that these bytes are, or _NONE."""
    first, second = _key_of(text, at, stop)
    facts = rows[_row_of(text, at, stop, first, second, rows, keys), 2]
    return np.uint32(facts >> np.uint64(32)) if facts != np.uint64(0) else _NONE


@numba.njit(cache=True, nogil=True)
def _key_of(text: UInt8Array, at: int, stop: int) -> tuple[np.uint64, np.uint64]:
    """The bytes themselves in two words, or of more of them than fit a hash and 0."""
    if stop - at <= 8:
        return _word_at(text, at, stop), np.uint64(0)
    if stop - at <= _INLINE_BYTES:
        return _word_at(text, at, at + 8), _word_at(text, at + 8, stop)
    value = np.uint64(stop - at)
    while at < stop:
        value = np.uint64(mix(value * _BASE + _word_at(text, at, min(at + 8, stop))))
        at += 8
    return value, np.uint64(0)


@numba.njit(cache=True, nogil=True)
def _word_at(text: UInt8Array, at: int, stop: int) -> np.uint64:
    """Up to eight bytes as one number, the first its lowest."""
    place = np.uint64(at)
    if at + 8 <= len(text):
        word = np.uint64(0)
        for i in range(8):
            word |= np.uint64(text[place + np.uint64(i)]) << np.uint64(8 * i)
        return word & (np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * (stop - at)))
    word = np.uint64(0)
    for i in range(stop - at):
        word |= np.uint64(text[place + np.uint64(i)]) << np.uint64(8 * i)
    return word


@numba.njit(cache=True, nogil=True)
def _row_of(
    text: UInt8Array, at: int, stop: int, first: np.uint64, second: np.uint64, rows: UInt64Array, keys: UInt8Array
) -> np.uint64:
    """The row of a key, or the empty one where it belongs."""
    last = np.uint64(len(rows) - 1)
    n_bytes = np.uint64(stop - at)
    row = np.uint64(mix(first + second * _BASE)) & last
    while True:
        facts = rows[row, 2]
        if facts == np.uint64(0):
            return row
        if facts & _LOW_16 == n_bytes and rows[row, 0] == first:
            if n_bytes <= np.uint64(_INLINE_BYTES):
                if rows[row, 1] == second:
                    return row
            else:
                begin = int(rows[row, 1])
                i = 0
                while i < stop - at and keys[begin + i] == text[at + i]:
                    i += 1
                if i == stop - at:
                    return row
        row = (row + np.uint64(1)) & last


@numba.njit(cache=True, nogil=True)
def _is_full(table: Table) -> bool:
    """Whether a piece more may not fit; two thirds of the rows in use are the most that keep look-ups short."""
    used = table.used
    return bool(
        3 * (used[0] + 1) > 2 * len(table.rows)
        or used[1] + LONGEST_CACHED > len(table.keys)
        or used[2] + LONGEST_CACHED > len(table.tokens)
    )


@numba.njit(cache=True, nogil=True)
def _insert(
    text: UInt8Array,
    span: tuple[int, int],
    table: Table,
    tokens: UInt32Array,
    place: tuple[int, int],
) -> None:
    """Put a span of the text, which is not in the table, and its tokens, which lie from place to place, into it."""
    (at, stop), (begin, end) = span, place
    first, second = _key_of(text, at, stop)
    row = _row_of(text, at, stop, first, second, table.rows, table.keys)
    used, n_tokens = table.used, end - begin
    if stop - at > _INLINE_BYTES:
        second = np.uint64(used[1])
        for i in range(stop - at):
            table.keys[used[1] + i] = text[at + i]
        used[1] += stop - at
    others = np.uint64(0)
    if n_tokens > _INLINE_TOKENS:
        others = np.uint64(used[2])
        for i in range(begin + 1, end):
            table.tokens[used[2] + i - begin - 1] = tokens[i]
        used[2] += n_tokens - 1
    elif n_tokens > 1:
        third = np.uint64(tokens[begin + 2]) if n_tokens > 2 else np.uint64(0)
        others = np.uint64(tokens[begin + 1]) | third << np.uint64(32)
    facts = np.uint64(stop - at) | np.uint64(n_tokens) << np.uint64(16) | np.uint64(tokens[begin]) << np.uint64(32)
    table.rows[row, 0], table.rows[row, 1], table.rows[row, 2], table.rows[row, 3] = first, second, facts, others
    used[0] += 1


def empty_table(n_rows: int, key_bytes: int, n_tokens: int) -> Any:
    """A table of at least so many rows, with room for so many bytes of keys over 16 bytes and tokens after the first.

    Memory that is not written to is not taken.
    """
    rows = np.zeros((1 << max(n_rows - 1, 1).bit_length(), 4), np.uint64)
    return Table(rows, np.empty(key_bytes, np.uint8), np.empty(n_tokens, np.uint32), np.zeros(3, np.int64))
