r"""Repeated passages of at least N words and signs, found in two passes over the documents.

    anchors.parquet       key, doc_id, position (number of the word or sign), in runs sorted by key
    occurrences.parquet   key, doc_id, start, end (characters of the text), in runs sorted by key

A token is a word or a single sign, `\w+|[^\w\s]`; white space does not count, case does. A window is N tokens in a row.
Every token of a window that occurred before, in the order of documents and positions, is cut; first occurrences stay.
That is what a suffix array over the whole corpus would find (Lee et al. 2022, section 4.1), where the corpus need not
be in one memory:

    1  Of every window, the k-gram (k = N / 2) with the smallest hash is an anchor. Windows with equal tokens have equal
       anchors at equal places, so a window whose anchor occurs nowhere else occurs nowhere else itself. Source:
       Schleimer, Wilkerson, Aiken 2003, "Winnowing", section 3: 2 / (N - k + 2) of all positions are anchors.
    2  Of the windows whose anchor occurs more than once, and only of them, a hash is written; equal ones are grouped.

Windows are compared by 64-bit hashes: of ten thousand million different ones, fewer than three pairs share one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
from numpy.typing import NDArray

from data_pipeline.dedup.code_points import EMPTY_HASH, add_character, code_point_at, finish_hash
from data_pipeline.dedup.first_occurrence import (
    ANCHORS_FILE,
    ANCHORS_SCHEMA,
    OCCURRENCES_FILE,
    OCCURRENCES_SCHEMA,
    REPEATED_ANCHORS_FILE,
    REPEATED_ANCHORS_SCHEMA,
)
from data_pipeline.dedup.sorted_runs import RunWriter
from data_pipeline.dedup.spans import RowReader
from data_pipeline.dedup.text_batches import TextBatch, doc_id_range, text_batches
from data_pipeline.tasks import Counts, Progress
from megagpt.text.text_classes import N_CODE_POINTS, is_word_character
from megagpt.text.word_hashes import BASE, mix

_SPACE, _WORD, _SIGN = 0, 1, 2
UInt64Array = NDArray[np.uint64]
Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of the documents of a batch, one document after the other."""

    hashes: UInt64Array
    """(n,)."""
    starts: Int32Array
    """(n,) characters of the document before the token."""
    ends: Int32Array
    """(n,)."""
    bounds: NDArray[np.int64]
    """(documents + 1,): the i-th document has the tokens bounds[i]:bounds[i + 1]."""


def write_anchors(
    folder: Path, documents: Path, clusters: Path | None, n_tokens: int, progress: Progress | None = None
) -> Counts:
    """Write anchors.parquet for the documents that are still there.

    Args:
        folder: where to.
        documents: docs.parquet of the shard.
        clusters: clusters.parquet of the job; None where nothing was removed.
        n_tokens: N, at least 2.
        progress: called with bytes of text and documents.
    """
    n_documents = total_tokens = 0
    with RunWriter(folder / ANCHORS_FILE, ANCHORS_SCHEMA) as writer:
        for batch in text_batches(documents, clusters):
            tokens = tokenise(batch)
            keys, indices, positions = anchors_of(tokens, n_tokens)
            writer.add(keys, batch.doc_ids[indices], positions)
            n_documents += len(batch)
            total_tokens += len(tokens.hashes)
            if progress is not None:
                progress(batch.text_bytes, len(batch))
    return Counts(n_documents, n_documents, detail={"rows": writer.rows, "tokens": total_tokens})


def write_windows(
    folder: Path,
    documents: Path,
    clusters: Path | None,
    anchors: Sequence[Path],
    n_tokens: int,
    progress: Progress | None = None,
) -> Counts:
    """Write occurrences.parquet: the windows that may occur elsewhere too.

    Args:
        folder: where to.
        documents: docs.parquet of the shard.
        clusters: clusters.parquet of the job; None where nothing was removed.
        anchors: folders with repeated_anchors.parquet, of all partitions.
        n_tokens: N, as for the anchors.
        progress: called with bytes of text and documents.
    """
    n_documents = 0
    first_doc_id, _ = doc_id_range(documents) or (0, 0)
    reader = RowReader([path / REPEATED_ANCHORS_FILE for path in anchors], REPEATED_ANCHORS_SCHEMA, first_doc_id)
    with RunWriter(folder / OCCURRENCES_FILE, OCCURRENCES_SCHEMA) as writer:
        for batch in text_batches(documents, clusters):
            if len(batch):
                rows = reader.up_to(int(batch.doc_ids[-1]))
                touched = batch.select(np.isin(batch.doc_ids, rows["doc_id"]))
                tokens = tokenise(touched)
                repeated = np.zeros(len(tokens.hashes), np.bool_)
                at = tokens.bounds[np.searchsorted(touched.doc_ids, rows["doc_id"])] + rows["position"]
                repeated[at] = True
                keys, indices, starts, ends = windows_of(tokens, n_tokens, repeated)
                writer.add(keys, touched.doc_ids[indices], starts, ends)
            n_documents += len(batch)
            if progress is not None:
                progress(batch.text_bytes, len(batch))
    return Counts(n_documents, n_documents, detail={"rows": writer.rows})


def tokenise(batch: TextBatch) -> Tokens:
    """Hash and place of every token."""
    # A token has at least one byte.
    hashes = np.empty(batch.text_bytes, np.uint64)
    starts, ends = np.empty(batch.text_bytes, np.int32), np.empty(batch.text_bytes, np.int32)
    bounds = np.zeros(len(batch) + 1, np.int64)
    _tokenise(*batch.utf8(), _classes(), (hashes, starts, ends), bounds)
    n = bounds[-1]
    return Tokens(hashes[:n], starts[:n], ends[:n], bounds)


def anchors_of(tokens: Tokens, n_tokens: int) -> tuple[UInt64Array, Int32Array, Int32Array]:
    """Key, document of the batch and position in it of each anchor, in their order; (n,) each."""
    n_most = len(tokens.hashes)
    keys, indices, positions = np.empty(n_most, np.uint64), np.empty(n_most, np.int32), np.empty(n_most, np.int32)
    n = _anchors(tokens.hashes, tokens.bounds, n_tokens, (keys, indices, positions))
    return keys[:n].copy(), indices[:n].copy(), positions[:n].copy()


def windows_of(
    tokens: Tokens, n_tokens: int, repeated: NDArray[np.bool_]
) -> tuple[UInt64Array, Int32Array, Int32Array, Int32Array]:
    """Key, document of the batch, first and last character of each window whose anchor is repeated; (n,) each.

    Args:
        tokens: of a batch.
        n_tokens: N.
        repeated: (tokens,) whether an anchor that begins there occurs elsewhere too.
    """
    n_most = len(tokens.hashes)
    keys, indices = np.empty(n_most, np.uint64), np.empty(n_most, np.int32)
    starts, ends = np.empty(n_most, np.int32), np.empty(n_most, np.int32)
    places = (tokens.starts, tokens.ends)
    n = _windows(tokens.hashes, tokens.bounds, places, n_tokens, repeated, (keys, indices, starts, ends))
    return keys[:n].copy(), indices[:n].copy(), starts[:n].copy(), ends[:n].copy()


@functools.cache
def _classes() -> NDArray[np.uint8]:
    r"""_SPACE, _WORD or _SIGN by code point; `\s` is `str.isspace`, and no space lies beyond the first plane."""
    table = np.where(is_word_character(), _WORD, _SIGN).astype(np.uint8)
    table[[code for code in range(N_CODE_POINTS >> 4) if chr(code).isspace()]] = _SPACE
    table.setflags(write=False)
    return table


@numba.njit(cache=True, nogil=True)
def _tokenise(
    data: NDArray[np.uint8],
    offsets: NDArray[np.int64],
    classes: NDArray[np.uint8],
    tokens: tuple[UInt64Array, Int32Array, Int32Array],
    bounds: NDArray[np.int64],
) -> None:
    hashes, starts, ends = tokens
    n = 0
    for document in range(len(offsets) - 1):
        at, last = offsets[document], offsets[document + 1]
        position = 0
        in_word = False
        state = np.uint64(EMPTY_HASH)
        while at < last:
            code, width = code_point_at(data, at)
            kind = classes[code]
            if kind == _WORD:
                if not in_word:
                    state, starts[n], in_word = np.uint64(EMPTY_HASH), position, True
                state = add_character(state, code)
            else:
                if in_word:
                    hashes[n], ends[n], in_word = finish_hash(state), position, False
                    n += 1
                if kind == _SIGN:
                    hashes[n] = finish_hash(add_character(np.uint64(EMPTY_HASH), code))
                    starts[n], ends[n] = position, position + 1
                    n += 1
            at += width
            position += 1
        if in_word:
            hashes[n], ends[n] = finish_hash(state), position
            n += 1
        bounds[document + 1] = n


@numba.njit(cache=True, nogil=True)
def _roll(hashes: UInt64Array, length: int, out: UInt64Array) -> None:
    """One hash for each run of `length` tokens: a polynomial modulo 2^64, well mixed; out has one value a run."""
    base = np.uint64(BASE)
    leaving = np.uint64(1)
    value = np.uint64(0)
    for i in range(length):
        value = value * base + hashes[i]
        leaving = leaving * base
    out[0] = mix(value)
    for i in range(length, len(hashes)):
        value = value * base + hashes[i] - leaving * hashes[i - length]
        out[i - length + 1] = mix(value)


@numba.njit(cache=True, nogil=True)
def _minima(values: UInt64Array, width: int, out: Int32Array) -> None:
    """The place of the smallest of each `width` values in a row, of equal ones the last; out has one value a window.

    The last of equal ones: as each window's choice depends on nothing but its own values, two equal windows choose two
    different places even where they overlap.
    """
    best = -1
    for last in range(width - 1, len(values)):
        first = last - width + 1
        if best < first:
            best = first
            for i in range(first + 1, last + 1):
                if values[i] <= values[best]:
                    best = i
        elif values[last] <= values[best]:
            best = last
        out[first] = best


@numba.njit(cache=True, nogil=True)
def _anchors(
    hashes: UInt64Array,
    bounds: NDArray[np.int64],
    n_tokens: int,
    rows: tuple[UInt64Array, Int32Array, Int32Array],
) -> int:
    keys, indices, positions = rows
    gram = max(1, n_tokens // 2)
    most = np.max(bounds[1:] - bounds[:-1]) if len(bounds) > 1 else 0
    grams, minima = np.empty(most, np.uint64), np.empty(most, np.int32)
    n = 0
    for document in range(len(bounds) - 1):
        length = bounds[document + 1] - bounds[document]
        if length < n_tokens:
            continue
        n_grams, n_windows = length - gram + 1, length - n_tokens + 1
        _roll(hashes[bounds[document] : bounds[document + 1]], gram, grams[:n_grams])
        _minima(grams[:n_grams], n_tokens - gram + 1, minima[:n_windows])
        previous = -1
        for window in range(n_windows):
            if minima[window] != previous:
                previous = minima[window]
                keys[n], indices[n], positions[n] = grams[previous], document, previous
                n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _windows(
    hashes: UInt64Array,
    bounds: NDArray[np.int64],
    places: tuple[Int32Array, Int32Array],
    n_tokens: int,
    repeated: NDArray[np.bool_],
    rows: tuple[UInt64Array, Int32Array, Int32Array, Int32Array],
) -> int:
    token_starts, token_ends = places
    keys, indices, starts, ends = rows
    gram = max(1, n_tokens // 2)
    most = np.max(bounds[1:] - bounds[:-1]) if len(bounds) > 1 else 0
    grams, minima = np.empty(most, np.uint64), np.empty(most, np.int32)
    n = 0
    for document in range(len(bounds) - 1):
        begin = bounds[document]
        length = bounds[document + 1] - begin
        if length < n_tokens:
            continue
        n_grams, n_windows = length - gram + 1, length - n_tokens + 1
        _roll(hashes[begin : begin + length], gram, grams[:n_grams])
        _minima(grams[:n_grams], n_tokens - gram + 1, minima[:n_windows])
        # The k-grams are of no more use; the windows' hashes take their place.
        _roll(hashes[begin : begin + length], n_tokens, grams[:n_windows])
        for window in range(n_windows):
            if repeated[begin + minima[window]]:
                keys[n], indices[n] = grams[window], document
                starts[n] = token_starts[begin + window]
                ends[n] = token_ends[begin + window + n_tokens - 1]
                n += 1
    return n
