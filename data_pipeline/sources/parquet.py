"""Parquet files with a text column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.document import Damage, Shard
from data_pipeline.sources.files import open_file
from data_pipeline.sources.record import RawRecord, Records, scalar_meta
from megagpt.errors import DataError

_BATCH_ROWS = 512
_MAX_ORDINAL = 2**32 - 1
"""The lower half of a document's id."""
_UNREADABLE = (pa.ArrowException, OSError)


def read_parquet(shard: Shard, text_key: str) -> Records:
    """One record a row; the columns `url` and `meta` (JSON or a struct) go along where they exist.

    A row group that cannot be decoded is a Damage from its first row that is lost, and the next one is read; where
    only `url` or `meta` is damaged, the texts come without them. A damaged footer loses the file: there alone stands
    where the row groups are.

    Raises:
        DataError: there is no column `text_key`.
    """
    with open_file(shard.path) as file:
        size = file.seek(0, 2)
        table = _open_table(file, size)
        if table is None:
            yield Damage(shard.path, 0, "parquet.unreadable", size)
            return
        names = table.schema_arrow.names
        if text_key not in names:
            raise DataError(
                f"{shard.path}: no column {text_key!r}; columns are {', '.join(names)}. Set the source's text_key"
            )
        columns = [name for name in dict.fromkeys((text_key, "url", "meta")) if name in names]
        ordinal = n_rows = 0
        for group in range(table.num_row_groups):
            reader = _GroupReader(table, group, ordinal, shard, size)
            yield from reader.read(columns)
            # A damaged footer may name fewer rows than there are: ids stay unique.
            ordinal = max(ordinal + reader.n_rows, reader.next_ordinal)
            n_rows += reader.n_rows
            if ordinal > _MAX_ORDINAL:
                yield Damage(shard.path, 0, "parquet.impossible_row_count", size)
                return
        if n_rows != table.metadata.num_rows:
            yield Damage(shard.path, max(size - 8, 0), "parquet.row_counts_disagree", 0)


def _open_table(file: BinaryIO, size: int) -> pq.ParquetFile | None:
    """The file's footer, with no length in it believed that is larger than the file."""
    try:
        return pq.ParquetFile(
            file,
            pre_buffer=False,
            page_checksum_verification=True,
            thrift_string_size_limit=max(size, 1),
            thrift_container_size_limit=max(size, 1),
        )
    except (*_UNREADABLE, UnicodeDecodeError):
        return None


class _GroupReader:
    """The rows of one row group, in batches."""

    def __init__(self, table: pq.ParquetFile, group: int, ordinal: int, shard: Shard, size: int) -> None:
        self._table = table
        self._group = group
        self._shard = shard
        self._metadata = table.metadata.row_group(group)
        self._position = size * (group + 1) // table.num_row_groups
        self._size = size
        self.next_ordinal = ordinal
        self.n_rows: int = max(self._metadata.num_rows, 0)
        self._end = ordinal + self.n_rows

    def read(self, columns: list[str]) -> Records:
        """Every row that can be read, the first column being the text."""
        yield from self._rows(columns)
        if self.next_ordinal < self._end and len(columns) > 1:
            first_lost = self.next_ordinal
            yield from self._rows(columns[:1])
            if self.next_ordinal > first_lost:
                yield self._damage("parquet.column_damaged", first_lost)
        if self.next_ordinal < self._end:
            yield self._damage("parquet.row_group_damaged", self.next_ordinal)

    def _rows(self, columns: list[str]) -> Records:
        """The rows from the next one on, as far as they can be decoded."""
        to_skip = self.n_rows - (self._end - self.next_ordinal)
        try:
            for batch in self._table.iter_batches(
                _BATCH_ROWS, row_groups=[self._group], columns=columns, use_threads=False
            ):
                batch.validate(full=False)
                skipped = min(to_skip, len(batch))
                to_skip -= skipped
                for row in _rows_of(batch.slice(skipped)):
                    yield self._record(row, columns[0])
                    self.next_ordinal += 1
        except _UNREADABLE:
            return

    def _record(self, row: dict[str, Any] | None, text_key: str) -> RawRecord | Damage:
        path, ordinal = self._shard.path, self.next_ordinal
        if row is None:
            return Damage(path, ordinal, "parquet.not_utf8", unit="row")
        text = row[text_key]
        if not isinstance(text, str):
            return Damage(path, ordinal, "parquet.text_not_a_string", unit="row")
        url = row.get("url") or f"{path}:{ordinal}"
        return RawRecord(ordinal, str(url), text=text, meta=_meta(row.get("meta")), position=self._position)

    def _damage(self, reason: str, ordinal: int) -> Damage:
        # Not by the byte: asked where a column lies, pyarrow 26 ends the process if the footer is damaged there.
        lost = min(max(self._metadata.total_byte_size, 0), self._size)
        return Damage(self._shard.path, ordinal, reason, lost, unit="row and what follows in its group")


def _rows_of(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """The rows as dictionaries; None for one whose strings are not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(len(batch)):
            try:
                yield batch.slice(at, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _meta(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return {"meta": value}
    return scalar_meta(value)
