"""Per shard: one row for each line or paragraph, by the hash of what it says.

    occurrences.parquet   key, doc_id, start, end (characters of the text), in runs sorted by key

Two units are the same if they agree after lower-casing, with every digit as 0 and without punctuation and accents.
Source: Wenzek et al. 2020 (CCNet), section 3.1; unlike there, white space of any length is one space. The hash has 64
bits: of ten thousand million different units, fewer than three pairs share one.
"""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path
from typing import Literal

import numba
import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.code_points import EMPTY_HASH, add_character, code_point_at, finish_hash
from data_pipeline.dedup.first_occurrence import OCCURRENCES_FILE, OCCURRENCES_SCHEMA
from data_pipeline.dedup.sorted_runs import RunWriter
from data_pipeline.dedup.text_batches import TextBatch, text_batches
from data_pipeline.tasks import Counts, Progress
from megagpt.text.text_classes import N_CODE_POINTS, is_word_character

Unit = Literal["line", "paragraph"]

_LINE_BREAK = ord("\n")
_SPACE = ord(" ")
# Decompositions, lower case, digits, punctuation and marks lie in the first three planes; the variation selectors,
# which are marks too, in the fifteenth.
_PLANES_WITH_RULES = ((0, 0x30000), (0xE0000, 0xE0200))


def write_units(
    folder: Path,
    documents: Path,
    clusters: Path | None,
    unit: Unit,
    min_words: int,
    progress: Progress | None = None,
) -> Counts:
    r"""Write one row for each unit of the documents that are still there.

    Args:
        folder: where to.
        documents: docs.parquet of the shard.
        clusters: clusters.parquet of the job; None where nothing was removed.
        unit: `line`: between line breaks; `paragraph`: lines up to the next blank one.
        min_words: units with fewer words (`\w+`) are left out.
        progress: called with bytes of text and documents.
    """
    n_documents = 0
    with RunWriter(folder / OCCURRENCES_FILE, OCCURRENCES_SCHEMA) as writer:
        for batch in text_batches(documents, clusters):
            keys, indices, starts, ends = unit_rows(batch, unit, min_words)
            writer.add(keys, batch.doc_ids[indices], starts, ends)
            n_documents += len(batch)
            if progress is not None:
                progress(batch.text_bytes, len(batch))
    return Counts(n_documents, n_documents, detail={"rows": writer.rows})


def unit_rows(
    batch: TextBatch, unit: Unit, min_words: int
) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Key, document of the batch, start and end of each unit, in their order; (n,) each."""
    data, offsets = batch.utf8()
    # A unit has at least one character that is no line break, and so with the break after it two bytes.
    n_most = batch.text_bytes // 2 + len(batch)
    keys, indices = np.empty(n_most, np.uint64), np.empty(n_most, np.int32)
    starts, ends = np.empty(n_most, np.int32), np.empty(n_most, np.int32)
    tables = (*normal_forms(), is_word_character())
    n = _find_units(data, offsets, tables, (unit == "line", min_words), (keys, indices, starts, ends))
    return keys[:n].copy(), indices[:n].copy(), starts[:n].copy(), ends[:n].copy()


@functools.cache
def normal_forms() -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
    """What becomes of each character: the characters of code point c are codes[bounds[c]:bounds[c + 1]].

    Returns:
        codes, and bounds (0x110001,), both read-only.
    """
    codes = np.arange(N_CODE_POINTS, dtype=np.uint32)
    lengths = np.ones(N_CODE_POINTS, np.int32)
    parts, at = [], 0
    for first, last in _PLANES_WITH_RULES:
        forms = [_normal_form(chr(code)) for code in range(first, last)]
        lengths[first:last] = [len(form) for form in forms]
        parts += [codes[at:first], np.array([ord(c) for form in forms for c in form], np.uint32)]
        at = last
    codes = np.concatenate([*parts, codes[at:]])
    bounds = np.zeros(N_CODE_POINTS + 1, np.int32)
    np.cumsum(lengths, out=bounds[1:])
    codes.setflags(write=False)
    bounds.setflags(write=False)
    return codes, bounds


def _normal_form(character: str) -> str:
    if character.isspace():
        return " "
    lowered = character.lower().replace("\u03c2", "\u03c3")  # the capital of both sigmas has no other lower case
    letters = [c for c in unicodedata.normalize("NFD", lowered) if not _is_dropped(c)]
    return "".join("0" if letter.isdecimal() else letter for letter in letters)


def _is_dropped(character: str) -> bool:
    """Punctuation, marks without a width of their own, control and format characters."""
    category = unicodedata.category(character)
    return category[0] == "P" or category in ("Mn", "Cc", "Cf")


@numba.njit(cache=True, nogil=True)
def _find_units(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    tables: tuple[NDArray[np.uint32], NDArray[np.int32], NDArray[np.bool_]],
    rule: tuple[bool, int],
    rows: tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]],
) -> int:
    """Fill rows (keys, documents, starts, ends) and return their number.

    A unit reaches from the begin of its first line to its last visible character. It is open from its first visible
    character to the line break that closes it: the next one, or for paragraphs that of a blank line.
    """
    codes, bounds, is_word = tables
    by_line, min_words = rule
    keys, indices, starts, ends = rows
    n = 0
    for document in range(len(offsets) - 1):
        at, last = offsets[document], offsets[document + 1]
        position = line_start = start = end = n_words = 0
        is_open = in_word = after_space = False
        line_is_blank = True
        state = np.uint64(EMPTY_HASH)
        # One step beyond the text: its end closes what is open.
        while at <= last:
            code, width = code_point_at(data, at) if at < last else (np.int64(_LINE_BREAK), 1)
            is_break = code == _LINE_BREAK
            if is_open and is_break and (by_line or line_is_blank or at == last):
                is_open = False
                if n_words >= min_words:
                    keys[n], indices[n], starts[n], ends[n] = finish_hash(state), document, start, end
                    n += 1
            form = codes[bounds[code] : bounds[code + 1]]
            if len(form) == 1 and form[0] == _SPACE:
                after_space, in_word = True, False
            else:
                if not is_open:
                    is_open, start, n_words, state = True, line_start, 0, np.uint64(EMPTY_HASH)
                state = _add_form(state, form, after_space)
                after_space = after_space and len(form) == 0
                n_words += is_word[code] and not in_word
                in_word = is_word[code]
                line_is_blank = False
                end = position + 1
            at += width
            position += 1
            if is_break:
                line_start, line_is_blank = position, True
    return n


@numba.njit(cache=True, nogil=True, inline="always")
def _add_form(state: np.uint64, form: NDArray[np.uint32], after_space: bool) -> np.uint64:  # noqa: FBT001
    """Take in a character's normal form, and the space before it where it is neither the first nor nothing."""
    if after_space and len(form) and state != np.uint64(EMPTY_HASH):
        state = add_character(state, np.uint32(_SPACE))
    for code in form:
        state = add_character(state, code)
    return state
