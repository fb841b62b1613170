"""Compiled loops over the characters and tokens of a text; `text_view` calls them, and imports them when it does.

Tokens are those of the pattern that `TextView.tokens` states. Equal tokens and n-grams are found by comparing what they
consist of, never by a hash alone, so the counts are exact.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
UInt8Array = NDArray[np.uint8]
UInt32Array = NDArray[np.uint32]
UInt64Array = NDArray[np.uint64]
Spans = tuple[Int32Array, Int32Array, UInt64Array]

_CODE_POINTS = 0x110000
_WORD = np.uint8(1)
_SPACE = np.uint8(2)
_LETTER = np.uint8(4)
_APOSTROPHE = np.uint8(8)
_JOINER = np.uint8(16)
_END_MARK = np.uint8(32)
_CLOSER = np.uint8(64)
_NEWLINE = np.uint32(10)
# FNV-1a's start and prime. Source: Fowler, Noll, Vo, draft-eastlake-fnv, section 5.
_FNV_START = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
# 2^64 divided by the golden ratio: spreads keys over the upper bits. Source: Knuth, TAOCP 3, section 6.4.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    """Compile at the first call, and keep the machine code beside the source for other processes."""
    compile_it: Any = numba.njit(cache=True, nogil=True)
    compiled: _Function = compile_it(function)
    return compiled


@functools.cache
def character_classes() -> UInt8Array:
    r"""(0x110000,): for each code point the classes it belongs to, as Python's `\w`, `\s` and `str.isalpha` say."""
    table = np.zeros(_CODE_POINTS, np.uint8)
    everything = np.arange(_CODE_POINTS, dtype=np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
    for run in re.finditer(r"\s+", everything):
        table[run.start() : run.end()] |= _SPACE
    for run in re.finditer(r"\w+", everything):
        table[run.start() : run.end()] |= _WORD
        letters = [place for place in range(*run.span()) if everything[place].isalpha()]
        table[letters] |= _LETTER
    for signs, bit in (("'\u2019", _APOSTROPHE), (".,:@", _JOINER), (".?!", _END_MARK), ("\"'\u201d\u2019)]", _CLOSER)):
        table[list(map(ord, signs))] |= bit
    table.setflags(write=False)
    return table


def code_points(text: str) -> UInt32Array:
    """(characters,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@_compiled
def count_words(codes: UInt32Array, classes: UInt8Array) -> tuple[int, int, int, int, int]:
    """(tokens, words, characters in words, runs between white space, such runs with a letter)."""
    n_tokens = n_words = characters = n_spaced = n_lettered = 0
    at = 0
    in_run = run_has_letter = False
    while at < len(codes):
        kind = classes[codes[at]]
        if kind & _SPACE:
            in_run = run_has_letter = False
            at += 1
            continue
        n_tokens += 1
        n_spaced += not in_run
        in_run = True
        end = _end_of_token(codes, classes, at)
        if kind & _WORD:
            n_words += 1
            characters += end - at
            if not run_has_letter and _has_letter(codes, classes, at, end):
                n_lettered += 1
                run_has_letter = True
        at = end
    return n_tokens, n_words, characters, n_spaced, n_lettered


@_compiled
def count_pieces(codes: UInt32Array, classes: UInt8Array) -> tuple[int, int]:
    """(words and signs, those with a letter), cut as grammars of English do; see `TextView.pieces`."""
    n_pieces = n_lettered = 0
    at = 0
    joined = has_letter = False
    while at < len(codes):
        kind = classes[codes[at]]
        end = at + 1
        if kind & _WORD:
            while end < len(codes) and classes[codes[end]] & _WORD:
                end += 1
            has_letter = has_letter and joined
            n_pieces += not joined
            if not has_letter and _has_letter(codes, classes, at, end):
                n_lettered += 1
                has_letter = True
            joined = False
        elif not kind & _SPACE:
            inside = kind & (_JOINER | _APOSTROPHE) and _is_inside_word(codes, classes, at)
            joined = inside and kind & _JOINER != 0
            n_pieces += not inside and (at == 0 or codes[at - 1] != codes[at])
        at = end
    return n_pieces, n_lettered


@_compiled
def count_sentences(codes: UInt32Array, classes: UInt8Array) -> int:
    """Sentences of a text whose lines each begin a new one; see `TextView.n_sentences`."""
    n_sentences = 0
    is_open = after_mark = False
    for code in codes:
        kind = classes[code]
        if kind & _SPACE:
            if after_mark or (is_open and code == _NEWLINE):
                n_sentences += 1
                is_open = after_mark = False
        else:
            is_open = True
            after_mark = kind & _END_MARK != 0 or (after_mark and kind & _CLOSER != 0)
    return n_sentences + is_open


@_compiled
def _is_inside_word(codes: UInt32Array, classes: UInt8Array, at: int) -> bool:
    if at == 0 or at + 1 == len(codes):
        return False
    return bool(classes[codes[at - 1]] & classes[codes[at + 1]] & _WORD)


@_compiled
def _has_letter(codes: UInt32Array, classes: UInt8Array, start: int, end: int) -> bool:
    while start < end and not classes[codes[start]] & _LETTER:
        start += 1
    return start < end


@_compiled
def _end_of_token(codes: UInt32Array, classes: UInt8Array, start: int) -> int:
    end = start + 1
    if not classes[codes[start]] & _WORD:
        return end
    size = len(codes)
    while end < size and classes[codes[end]] & _WORD:
        end += 1
    if end + 1 < size and classes[codes[end]] & _APOSTROPHE and classes[codes[end + 1]] & _WORD:
        end += 2
        while end < size and classes[codes[end]] & _WORD:
            end += 1
    return end


def find_tokens(codes: UInt32Array, classes: UInt8Array, n_tokens: int) -> Spans:
    """(starts, ends, hashes), each (n_tokens,)."""
    spans = np.empty(n_tokens, np.int32), np.empty(n_tokens, np.int32), np.empty(n_tokens, np.uint64)
    _fill_spans(codes, classes, *spans)
    return spans


@_compiled
def _fill_spans(
    codes: UInt32Array, classes: UInt8Array, starts: Int32Array, ends: Int32Array, hashes: UInt64Array
) -> None:
    at = found = 0
    while at < len(codes):
        if classes[codes[at]] & _SPACE:
            at += 1
            continue
        end = _end_of_token(codes, classes, at)
        value = _FNV_START
        for place in range(at, end):
            value = (value ^ np.uint64(codes[place])) * _FNV_PRIME
        starts[found] = at
        ends[found] = end
        hashes[found] = value
        found += 1
        at = end


@_compiled
def _same(codes: UInt32Array, start: int, end: int, others: UInt32Array, other_start: int, other_end: int) -> bool:
    if end - start != other_end - other_start:
        return False
    place = 0
    while place < end - start and codes[start + place] == others[other_start + place]:
        place += 1
    return place == end - start


def _table_size(n_entries: int) -> int:
    """Slots of a table that is at most half full, a power of two."""
    return max(4, 1 << (2 * n_entries - 1).bit_length())


def number_tokens(codes: UInt32Array, spans: Spans) -> Int32Array:
    """(tokens,): for each token the place of the first one that is equal to it."""
    n_tokens = len(spans[0])
    numbers = np.empty(n_tokens, np.int32)
    _fill_numbers(codes, *spans, np.full(_table_size(n_tokens), -1, np.int32), numbers)
    return numbers


@_compiled
def _fill_numbers(
    codes: UInt32Array,
    starts: Int32Array,
    ends: Int32Array,
    hashes: UInt64Array,
    table: Int32Array,
    numbers: Int32Array,
) -> None:
    mask = len(table) - 1
    for at in range(len(starts)):
        slot = np.int64((hashes[at] * _SPREAD) >> _HALF) & mask
        while table[slot] >= 0:
            first = table[slot]
            if hashes[first] == hashes[at] and _same(codes, starts[at], ends[at], codes, starts[first], ends[first]):
                break
            slot = (slot + 1) & mask
        if table[slot] < 0:
            table[slot] = at
        numbers[at] = table[slot]


def count_present(codes: UInt32Array, tokens: Spans, word_codes: UInt32Array, words: Spans) -> int:
    """How many words occur among the tokens.

    Args:
        codes: the text.
        tokens: starts, ends and hashes of its tokens.
        word_codes: a text that holds the words.
        words: starts, ends and hashes of the words, by rising hash.
    """
    present = np.zeros(len(words[0]), np.uint8)
    _mark_present(codes, *tokens, word_codes, words, present)
    return int(present.sum())


@_compiled
def _mark_present(
    codes: UInt32Array,
    starts: Int32Array,
    ends: Int32Array,
    hashes: UInt64Array,
    word_codes: UInt32Array,
    words: Spans,
    present: UInt8Array,
) -> None:
    word_starts, word_ends, word_hashes = words
    for at in range(len(hashes)):
        low, high = 0, len(word_hashes)
        while low < high:
            middle = (low + high) // 2
            if word_hashes[middle] < hashes[at]:
                low = middle + 1
            else:
                high = middle
        if low < len(word_hashes) and word_hashes[low] == hashes[at] and not present[low]:
            present[low] = _same(codes, starts[at], ends[at], word_codes, word_starts[low], word_ends[low])


def repeated_characters(tokens: Int32Array, lengths: Int32Array) -> list[int]:
    """Gopher's n-gram repetition of a text in characters.

    Args:
        tokens: (n,) as `number_tokens` gives them.
        lengths: (n,) characters of each token.

    Returns:
        Nine numbers: of the most frequent 2-, 3- and 4-gram all occurrences, with one space between tokens (of equally
        frequent ones the longest); of 5- to 10-grams those that occurred before, from left to right and without
        overlap. N-grams that occur once count as nothing.
    """
    counts = [0] * 9
    n_tokens = len(tokens)
    before = np.zeros(n_tokens + 1, np.int32)
    np.cumsum(lengths, out=before[1:])
    occurrences = np.empty(n_tokens, np.int32)
    numbers = tokens.copy()
    size = _table_size(n_tokens)
    keys, firsts = np.empty(size, np.uint64), np.empty(size, np.int32)
    positions = np.arange(n_tokens, dtype=np.int32)
    n_positions = max(n_tokens - 1, 0)
    for n in range(2, 11):
        size = _table_size(n_positions)
        n_positions = _number_ngrams(numbers, positions[:n_positions], occurrences, keys[:size], firsts[:size])
        if not n_positions:
            break
        repeated = positions[:n_positions]
        count_characters = _top_characters if n < 5 else _duplicate_characters
        counts[n - 2] = count_characters(repeated, numbers, occurrences, before, n)
        n_positions = _keep_neighbours(repeated)
    return counts


@_compiled
def _number_ngrams(
    numbers: Int32Array, positions: Int32Array, occurrences: Int32Array, keys: UInt64Array, firsts: Int32Array
) -> int:
    """Turn the numbers of (n - 1)-grams into those of n-grams at `positions`, and keep the positions of repeated ones.

    The number of an n-gram is the first place where it begins, so that two neighbours say exactly which n + 1-gram
    they are; `occurrences` counts it there. Returns how many positions are kept, at the beginning of `positions`.
    """
    mask = len(firsts) - 1
    firsts[:] = -1
    for at in positions:
        occurrences[at] = 0
    for at in positions:  # rising, so that numbers[at + 1] is still the shorter n-gram's
        key = (np.uint64(numbers[at]) << _HALF) | np.uint64(numbers[at + 1])
        slot = np.int64((key * _SPREAD) >> _HALF) & mask
        while firsts[slot] >= 0 and keys[slot] != key:
            slot = (slot + 1) & mask
        if firsts[slot] < 0:
            firsts[slot] = at
            keys[slot] = key
        numbers[at] = firsts[slot]
        occurrences[firsts[slot]] += 1
    kept = 0
    for at in positions:
        if occurrences[numbers[at]] > 1:
            positions[kept] = at
            kept += 1
    return kept


@_compiled
def _keep_neighbours(positions: Int32Array) -> int:
    """Keep positions whose successor is there: n + 1 tokens repeat only where their first n and their last n do."""
    kept = 0
    for place in range(len(positions) - 1):
        if positions[place + 1] == positions[place] + 1:
            positions[kept] = positions[place]
            kept += 1
    return kept


@_compiled
def _top_characters(
    positions: Int32Array, numbers: Int32Array, occurrences: Int32Array, before: Int32Array, n: int
) -> int:
    most = longest = 0
    for at in positions:
        if numbers[at] == at and occurrences[at] >= most:
            length = before[at + n] - before[at]
            if occurrences[at] > most or length > longest:
                longest = length
            most = occurrences[at]
    return most * (longest + n - 1)


@_compiled
def _duplicate_characters(
    positions: Int32Array, numbers: Int32Array, occurrences: Int32Array, before: Int32Array, n: int
) -> int:
    characters = free = 0
    for at in positions:
        if at >= free:
            first = numbers[at]
            if occurrences[first] < 0:  # seen
                characters += before[at + n] - before[at]
                free = at + n
            else:
                occurrences[first] = -occurrences[first]
    return characters
