"""By range of keys: which rows hold a key that occurred before.

    repeats.parquet            doc_id, start, end: passages that occurred before, sorted, not overlapping
    repeated_anchors.parquet   doc_id, position: of keys that occur more than once every occurrence, sorted

Before means in the order of (doc_id, start): of equal passages the first one stays, wherever the others are, also in
the same document. DuckDB does the grouping under a memory limit and spills beyond it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.spans import Columns, unite
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError

OCCURRENCES_FILE = "occurrences.parquet"
OCCURRENCES_SCHEMA = pa.schema(
    [("key", pa.uint64()), ("doc_id", pa.int64()), ("start", pa.int32()), ("end", pa.int32())]
)
ANCHORS_FILE = "anchors.parquet"
ANCHORS_SCHEMA = pa.schema([("key", pa.uint64()), ("doc_id", pa.int64()), ("position", pa.int32())])
REPEATS_FILE = "repeats.parquet"
REPEATS_SCHEMA = pa.schema([("doc_id", pa.int64()), ("start", pa.int32()), ("end", pa.int32())])
REPEATED_ANCHORS_FILE = "repeated_anchors.parquet"
REPEATED_ANCHORS_SCHEMA = pa.schema([("doc_id", pa.int64()), ("position", pa.int32())])

ROWS_PER_PARTITION = 25_000_000
"""Rows that one partition's grouping should read, see `n_partitions`."""
MEMORY_LIMIT = "512MB"
"""Of DuckDB alone: the process takes some 230 MB more. 40 million rows then cost 16 CPU-seconds, 10 million 3."""

_KEYS = 1 << 64
_BATCH_ROWS = 1 << 17
# A document id has 63 bits and a start 31: only a HUGEINT orders by both at once.
_REPEATS = """
    WITH keyed AS (
             SELECT key, doc_id, start, "end" FROM read_parquet(?) WHERE key BETWEEN ?::UBIGINT AND ?::UBIGINT
         ),
         firsts AS (
             SELECT key, min((doc_id::HUGEINT << 31) + start) AS first_place
             FROM keyed GROUP BY key HAVING count(*) > 1
         )
    SELECT doc_id, start, "end" FROM keyed JOIN firsts USING (key)
    WHERE (doc_id::HUGEINT << 31) + start <> first_place
    ORDER BY doc_id, start
"""
_REPEATED_ANCHORS = """
    WITH keyed AS (SELECT key, doc_id, position FROM read_parquet(?) WHERE key BETWEEN ?::UBIGINT AND ?::UBIGINT)
    SELECT doc_id, position FROM keyed SEMI JOIN (SELECT key FROM keyed GROUP BY key HAVING count(*) > 1) USING (key)
    ORDER BY doc_id, position
"""


def n_partitions(n_rows: int) -> int:
    """Into how many ranges the keys of so many rows are best cut."""
    return 1 + n_rows // ROWS_PER_PARTITION


def write_repeats(
    folder: Path, shards: Sequence[Path], partition: tuple[int, int], progress: Progress | None = None
) -> Counts:
    """Write repeats.parquet for one partition of the keys.

    Args:
        folder: where to.
        shards: folders with occurrences.parquet, of `write_units` or `write_windows`.
        partition: (number of this partition, number of partitions); the keys are cut into equal ranges.
        progress: called once, at the end.

    Raises:
        DataError: the disk is full, or another failure of DuckDB.
    """
    files = [shard / OCCURRENCES_FILE for shard in shards]
    repeats = spans = 0
    held: Columns = _columns(REPEATS_SCHEMA.empty_table())
    with pq.ParquetWriter(folder / REPEATS_FILE, REPEATS_SCHEMA, compression="zstd") as writer:
        for batch in _query(_REPEATS, files, partition, folder):
            united = unite(_joined(held, _columns(pa.table(batch).cast(REPEATS_SCHEMA))))
            # The last span may go on in the next batch.
            done, held = _split(united, len(united["doc_id"]) - 1)
            repeats += len(batch)
            spans += _write(writer, done)
        spans += _write(writer, held)
    if progress is not None:
        progress(sum(file.stat().st_size for file in files), repeats)
    return Counts(0, 0, detail={"repeats": repeats, "spans": spans})


def write_repeated_anchors(
    folder: Path, shards: Sequence[Path], partition: tuple[int, int], progress: Progress | None = None
) -> Counts:
    """Write repeated_anchors.parquet for one partition of the keys.

    Args:
        folder: where to.
        shards: folders with anchors.parquet.
        partition: (number of this partition, number of partitions); the keys are cut into equal ranges.
        progress: called once, at the end.

    Raises:
        DataError: the disk is full, or another failure of DuckDB.
    """
    files = [shard / ANCHORS_FILE for shard in shards]
    n_rows = 0
    with pq.ParquetWriter(folder / REPEATED_ANCHORS_FILE, REPEATED_ANCHORS_SCHEMA, compression="zstd") as writer:
        for batch in _query(_REPEATED_ANCHORS, files, partition, folder):
            n_rows += len(batch)
            writer.write_table(pa.table(batch).cast(REPEATED_ANCHORS_SCHEMA))
    if progress is not None:
        progress(sum(file.stat().st_size for file in files), n_rows)
    return Counts(0, 0, detail={"repeated_anchors": n_rows})


def _query(statement: str, files: Sequence[Path], partition: tuple[int, int], folder: Path) -> Iterator[pa.RecordBatch]:
    """The rows of a statement in batches, of the files' rows whose keys are in the partition."""
    import duckdb

    number, n = partition
    first, last = _KEYS * number // n, _KEYS * (number + 1) // n - 1
    spill = folder / "spill"
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": 1,
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
    }
    try:
        with duckdb.connect(config=config) as connection:
            rows = connection.sql(statement, params=[[str(file) for file in files], first, last])
            reader: pa.RecordBatchReader = rows.to_arrow_reader(_BATCH_ROWS)
            yield from reader
    except duckdb.Error as error:
        raise DataError(f"{folder}: grouping the passages of {len(files)} shards failed: {error}") from error
    finally:
        if spill.is_dir():
            for path in spill.iterdir():
                path.unlink()
            spill.rmdir()


def _columns(table: pa.Table) -> Columns:
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _joined(first: Columns, second: Columns) -> Columns:
    return {name: np.concatenate([first[name], second[name]]) for name in first}


def _split(rows: Columns, at: int) -> tuple[Columns, Columns]:
    return {name: column[:at] for name, column in rows.items()}, {name: column[at:] for name, column in rows.items()}


def _write(writer: pq.ParquetWriter, spans: Columns) -> int:
    """Write a row group and return its rows."""
    if len(spans["doc_id"]):
        writer.write_table(pa.table(spans, schema=REPEATS_SCHEMA))
    return len(spans["doc_id"])
