"""Parquet files with a text column."""

from __future__ import annotations

from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.document import Damage, Shard
from data_pipeline.sources.files import open_file
from data_pipeline.sources.record import RawRecord, Records, scalar_meta
from megagpt.errors import DataError

_BATCH_ROWS = 512


def read_parquet(shard: Shard, text_key: str) -> Records:
    """One record a row; the columns `url` and `meta` (JSON or a struct) go along where they exist.

    A row group that cannot be decoded is a Damage, and the next one is read.

    Raises:
        DataError: there is no column `text_key`.
    """
    with open_file(shard.path) as file:
        table = _open_table(file)
        if table is None:
            yield Damage(shard.path, 0, "parquet.unreadable", shard.size_bytes)
            return
        names = table.schema_arrow.names
        if text_key not in names:
            raise DataError(
                f"{shard.path}: no column {text_key!r}; columns are {', '.join(names)}. Set the source's text_key"
            )
        columns = [name for name in dict.fromkeys((text_key, "url", "meta")) if name in names]
        ordinal = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            yield from _read_group(table, group, ordinal, columns, shard)
            ordinal += rows


def _open_table(file: BinaryIO) -> pq.ParquetFile | None:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError):
        return None


def _read_group(table: pq.ParquetFile, group: int, ordinal: int, columns: list[str], shard: Shard) -> Records:
    text_key = columns[0]
    position = shard.size_bytes * (group + 1) // table.num_row_groups
    try:
        for batch in table.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns):
            for row in batch.to_pylist():
                yield _record(row, ordinal, text_key, shard, position)
                ordinal += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        lost = table.metadata.row_group(group).total_byte_size
        yield Damage(shard.path, ordinal, "parquet.row_group_damaged", lost, unit="row and what follows in its group")


def _record(row: dict[str, Any], ordinal: int, text_key: str, shard: Shard, position: int) -> RawRecord | Damage:
    text = row[text_key]
    if not isinstance(text, str):
        return Damage(shard.path, ordinal, "parquet.text_not_a_string", unit="row")
    url = row.get("url") or f"{shard.path}:{ordinal}"
    return RawRecord(ordinal, str(url), text=text, meta=_meta(row.get("meta")), position=position)


def _meta(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return {"meta": value}
    return scalar_meta(value)
