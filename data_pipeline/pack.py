"""All shards' tokens -> NAME_train, NAME_val, NAME_test, documents globally shuffled, in bounded memory.

Documents follow each other in the order of `shuffle.order_keys`. Where they do not fit into memory together, a first
pass deals them out to bucket files by the upper bits of the key; each bucket is then sorted by itself, and one after
the other they are the whole order. With `pack.per_source` every source has a training pair of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import PackSection
from data_pipeline.encode import ENCODED_FILE, TOKENS_PREFIX
from data_pipeline.pack_plan import PackPlan, plan_files
from data_pipeline.parquet_reader import open_rows
from data_pipeline.shuffle import UInt64Array, order_keys
from data_pipeline.tasks import Counts, Progress
from megagpt.data.indexed import TokenFileWriter, Tokens, bin_path, token_dtype
from megagpt.errors import DataError

BUCKET_BYTES = 192 << 20
"""Tokens and rows of a bucket; about three times as much is in memory while it is sorted."""

_READ_BYTES = 32 << 20  # tokens of a shard read at a time
_WRITE_BYTES = 4 << 20
_WRITE_DOCUMENTS = 1 << 14  # gathered at a time: Python objects, 200 bytes each
_BATCH_ROWS = 1 << 16
_BUCKETS_FOLDER = "buckets"

_ROW = np.dtype([("key", "<u8"), ("doc_id", "<i8"), ("file", "<i4"), ("n_tokens", "<i4")])
Rows = NDArray[np.void]
"""One document each, `_ROW`: where it goes, and how long it is."""


def write_packed(
    folder: Path,
    shards: Sequence[Path],
    vocab_size: int,
    settings: PackSection,
    progress: Progress | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> Counts:
    """Write the pairs of token files.

    Args:
        folder: where to.
        shards: folders of encoded shards; their order does not matter.
        vocab_size: of the tokenizer; decides the type of the tokens.
        settings: name, seed, split, one pair a source or not.
        progress: called with bytes of text and documents.
        bucket_bytes: tokens that are sorted in memory at a time; the result does not depend on it.

    Raises:
        DataError: a split would be empty, two sources would have files of one name, or a shard is damaged.
    """
    plan = plan_files(shards, settings)
    dtype = token_dtype(vocab_size)
    n_buckets = max(1, -(-(plan.n_tokens * dtype.itemsize + plan.n_documents * _ROW.itemsize) // bucket_bytes))
    meter = _Meter(progress, plan)
    blocks = _read_blocks(shards, plan, settings, dtype, meter)
    with ExitStack() as stack:
        writers = [stack.enter_context(TokenFileWriter(folder / name, dtype)) for name in plan.files]
        for rows, tokens in _in_buckets(blocks, folder / _BUCKETS_FOLDER, n_buckets, plan, dtype):
            _write_sorted(rows, tokens, writers, meter)
    files = {
        name: {**plan.files[name], "dtype": dtype.name, "max_token_id": writer.max_token_id}
        for name, writer in zip(plan.files, writers, strict=True)
    }
    return Counts(plan.n_documents, sum(w.n_documents for w in writers), detail={"splits": plan.splits, "files": files})


@dataclass
class _Meter:
    """Every token is moved twice, read and written; the text's bytes are reported in proportion."""

    progress: Progress | None
    plan: PackPlan
    n_moved: int = 0
    n_reported: int = 0

    def moved(self, n_tokens: int, n_documents: int) -> None:
        self.n_moved += n_tokens
        text_bytes = self.plan.text_bytes * self.n_moved // (2 * self.plan.n_tokens)
        if self.progress is not None:
            self.progress(text_bytes - self.n_reported, n_documents)
        self.n_reported = text_bytes


def _read_blocks(
    shards: Sequence[Path], plan: PackPlan, settings: PackSection, dtype: np.dtype[Any], meter: _Meter
) -> Iterator[tuple[Rows, Tokens]]:
    """The documents of all shards in their own order, some at a time, with their tokens one after the other.

    Files are read, not mapped: mapped pages would count as this process's memory.
    """
    for shard in shards:
        tokens_path = bin_path(shard / TOKENS_PREFIX)
        with open_rows(shard / ENCODED_FILE) as table, tokens_path.open("rb", buffering=0) as file:
            for batch in table.iter_batches(_BATCH_ROWS):
                rows = np.empty(len(batch), _ROW)
                rows["doc_id"] = batch.column("doc_id").to_numpy()
                rows["key"] = order_keys(rows["doc_id"], settings.seed)
                rows["n_tokens"] = batch.column("n_tokens").to_numpy()
                rows["file"] = plan.file_of(batch, settings)
                for start, end in _runs(rows["n_tokens"], _READ_BYTES // dtype.itemsize):
                    n_tokens = int(rows["n_tokens"][start:end].sum(dtype=np.int64))
                    tokens = np.fromfile(file, dtype, n_tokens)
                    if len(tokens) != n_tokens:
                        raise DataError(f"{tokens_path}: ends before the last document of {ENCODED_FILE} beside it")
                    yield rows[start:end], tokens
                    meter.moved(n_tokens, 0)
            if file.read(1):
                raise DataError(f"{tokens_path}: holds more tokens than the documents of {ENCODED_FILE} beside it")


def _in_buckets(
    blocks: Iterator[tuple[Rows, Tokens]], folder: Path, n_buckets: int, plan: PackPlan, dtype: np.dtype[Any]
) -> Iterator[tuple[Rows, Tokens]]:
    """All documents, one bucket after the other in the order of keys; unsorted inside."""
    if n_buckets == 1:
        rows, tokens = np.empty(plan.n_documents, _ROW), np.empty(plan.n_tokens, dtype)
        at_row = at_token = 0
        for block_rows, block_tokens in blocks:
            rows[at_row : at_row + len(block_rows)] = block_rows
            tokens[at_token : at_token + len(block_tokens)] = block_tokens
            at_row, at_token = at_row + len(block_rows), at_token + len(block_tokens)
        yield rows, tokens
        return
    folder.mkdir()
    for block_rows, block_tokens in blocks:
        _scatter(block_rows, block_tokens, folder, n_buckets)
    for bucket in range(n_buckets):
        paths = _bucket_paths(folder, bucket)
        if paths[0].exists():
            yield np.fromfile(paths[0], _ROW), np.fromfile(paths[1], dtype)
            for path in paths:
                path.unlink()
    folder.rmdir()


def _bucket_paths(folder: Path, bucket: int) -> tuple[Path, Path]:
    return folder / f"{bucket:06d}.rows", folder / f"{bucket:06d}.tokens"


def bucket_of(keys: UInt64Array, n_buckets: int) -> NDArray[np.int64]:
    """floor(key * n / 2**64) to 32 bits of the key: rises with the key, and each bucket gets an even share."""
    return ((keys >> np.uint64(32)) * np.uint64(n_buckets) >> np.uint64(32)).astype(np.int64)


def _scatter(rows: Rows, tokens: Tokens, folder: Path, n_buckets: int) -> None:
    """Append each document to the files of its bucket. They are closed again: there may be thousands."""
    buckets = bucket_of(rows["key"], n_buckets)
    order = np.argsort(buckets, kind="stable")
    first = np.searchsorted(buckets[order], np.arange(n_buckets + 1))
    starts = _starts(rows["n_tokens"])
    for bucket in np.flatnonzero(np.diff(first)).tolist():
        chosen = order[first[bucket] : first[bucket + 1]]
        rows_path, tokens_path = _bucket_paths(folder, bucket)
        with rows_path.open("ab") as file:
            file.write(rows[chosen].tobytes())
        with tokens_path.open("ab") as file:
            for part, _ in _gather(tokens, starts[chosen], rows["n_tokens"][chosen]):
                file.write(part)


def _write_sorted(rows: Rows, tokens: Tokens, writers: Sequence[TokenFileWriter], meter: _Meter) -> None:
    order = np.lexsort((rows["doc_id"], rows["key"], rows["file"]))
    first = np.searchsorted(rows["file"][order], np.arange(len(writers) + 1))
    starts = _starts(rows["n_tokens"])
    for number, writer in enumerate(writers):
        chosen = order[first[number] : first[number + 1]]
        for part, lengths in _gather(tokens, starts[chosen], rows["n_tokens"][chosen]):
            gathered = np.frombuffer(part, tokens.dtype)
            writer.add_documents(gathered, lengths)
            meter.moved(len(gathered), len(lengths))


def _starts(n_tokens: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.cumsum(n_tokens, dtype=np.int64) - n_tokens


def _gather(
    tokens: Tokens, starts: NDArray[np.int64], lengths: NDArray[np.int32]
) -> Iterator[tuple[bytes, NDArray[np.int32]]]:
    """The bytes of the documents that begin at `starts`, in that order, some megabytes at a time with their lengths."""
    view = tokens.view(np.uint8).data
    begins = starts * tokens.itemsize
    ends = begins + lengths * np.int64(tokens.itemsize)
    for first, last in _runs(lengths, _WRITE_BYTES // tokens.itemsize):
        slices = map(slice, begins[first:last].tolist(), ends[first:last].tolist())
        yield b"".join(map(view.__getitem__, slices)), lengths[first:last]


def _runs(n_tokens: NDArray[np.integer], most_tokens: int) -> Iterator[tuple[int, int]]:
    """[start, end) of runs of documents: as many as fit, at least one."""
    ends = np.cumsum(n_tokens, dtype=np.int64)
    start, n = 0, len(n_tokens)
    while start < n:
        before = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, before + most_tokens, side="right"))
        end = min(max(end, start + 1), start + _WRITE_DOCUMENTS)
        yield start, end
        start = end
