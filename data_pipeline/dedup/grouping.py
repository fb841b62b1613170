"""Rows with equal keys -> edges from the smallest document id of each group to the others.

A partition is a range of keys. It is worked through in passes, each a smaller range that fits into memory, is sorted
there and leaves its edges in a file; in the end DuckDB merges these, each edge once, under a memory limit beyond which
it spills into the task's own folder. All SQL of the project is in this file.

    edges.parquet        root, doc_id; sorted by both
    candidates.parquet   doc_id of every document of an edge, once, sorted (only where verification asks for it)
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.minhash import compiled
from data_pipeline.dedup.row_files import RowsWriter
from data_pipeline.dedup.signatures import BANDS_FILE, SIGNATURES_FILE
from data_pipeline.parquet_reader import open_rows
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError

if TYPE_CHECKING:
    import duckdb

EDGES_FILE = "edges.parquet"
CANDIDATES_FILE = "candidates.parquet"
EDGES_SCHEMA = pa.schema([("root", pa.int64()), ("doc_id", pa.int64())])
CANDIDATES_SCHEMA = pa.schema([("doc_id", pa.int64())])

ROWS_PER_PARTITION = 50_000_000
"""Rows of one task. Few partitions leave few edges twice (a pair shares up to `bands` keys, and each partition names it
once); many can run at a time."""
ROWS_PER_PASS = 8_000_000
"""Rows that are sorted at a time: 130 MB of keys and ids, 450 MB at the peak."""
MEMORY_LIMIT = "512MB"

_KEYS = 1 << 64
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SPILL_FOLDER = "spill"
_FILES = {"exact": SIGNATURES_FILE, "near": BANDS_FILE}
_COLUMNS = {"exact": ["hash_high", "hash_low", "doc_id"], "near": ["band_key", "doc_id"]}
_MERGE = "SELECT DISTINCT root, doc_id FROM read_parquet(?) ORDER BY root, doc_id"
_CANDIDATES = """
    SELECT doc_id FROM (SELECT root AS doc_id FROM read_parquet(?) UNION SELECT doc_id FROM read_parquet(?))
    ORDER BY doc_id
"""
_BATCH_ROWS = 1 << 17

UInt64Array = NDArray[np.uint64]
Int64Array = NDArray[np.int64]


def partitions_of(n_rows: int) -> int:
    """Into how many partitions so many rows are cut; always at least one."""
    return 1 + n_rows // ROWS_PER_PARTITION


def write_edges(
    folder: Path,
    kind: str,
    shards: Sequence[Path],
    partition: tuple[int, int],
    with_candidates: bool = False,  # noqa: FBT001, FBT002 - the arguments of a task are positional
    progress: Progress | None = None,
) -> Counts:
    """Write edges.parquet for one partition of the keys.

    Args:
        folder: where to.
        kind: `exact`: equal content hash; `near`: equal key of a band.
        shards: folders of signatures, of this job and of published ones.
        partition: (number of this partition, number of partitions); the keys are cut into equal ranges.
        with_candidates: write candidates.parquet as well.
        progress: called after each pass with the bytes read so far and no documents.

    Raises:
        DataError: the disk is full, or another failure of DuckDB.
    """
    files = [shard / _FILES[kind] for shard in shards]
    spill = folder / _SPILL_FOLDER
    spill.mkdir()
    try:
        n_parts = _write_parts(files, _COLUMNS[kind], partition, spill, progress)
        parts = [str(_part_path(spill, i)) for i in range(n_parts)]
        n_edges = _merge(_MERGE, parts, spill, folder / EDGES_FILE, EDGES_SCHEMA)
        if with_candidates:
            _merge(_CANDIDATES, parts, spill, folder / CANDIDATES_FILE, CANDIDATES_SCHEMA)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        message = f"grouping {kind} duplicates: cannot write into {folder} ({error}); free some space and run again"
        raise DataError(message) from error
    finally:
        _remove(spill)
    return Counts(0, 0, detail={"edges": n_edges, "parts": n_parts})


def _write_parts(
    files: Sequence[Path], columns: list[str], partition: tuple[int, int], spill: Path, progress: Progress | None
) -> int:
    number, n_partitions = partition
    n_rows = 0
    n_bytes = 0
    for path in files:
        with open_rows(path) as file:
            n_rows += file.metadata.num_rows
        n_bytes += path.stat().st_size
    n_passes = 1 + n_rows // n_partitions // ROWS_PER_PASS
    n_ranges, share = n_passes * n_partitions, n_bytes // n_partitions // n_passes
    n_parts = 0
    for i in range(n_passes):
        at = number * n_passes + i
        first, last = _KEYS * at // n_ranges, _KEYS * (at + 1) // n_ranges - 1
        for roots, doc_ids in _edges_of_range(files, columns, first, last):
            table = pa.table([roots, doc_ids], schema=EDGES_SCHEMA)
            pq.write_table(table, _part_path(spill, n_parts), compression="none", use_dictionary=False)
            n_parts += 1
        if progress is not None:
            progress(share, 0)
    return n_parts


def _part_path(spill: Path, number: int) -> Path:
    return spill / f"part-{number:05d}.parquet"


def _edges_of_range(
    files: Sequence[Path], columns: list[str], first: int, last: int
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """The edges of the keys first .. last.

    In memory: `ROWS_PER_PASS` rows or twice as many; where one key alone has more (a page that occurs a million
    times), the rows so far are replaced by their roots.
    """
    held: list[list[NDArray[np.generic]]] = []
    n_held, limit = 0, 2 * ROWS_PER_PASS
    for rows in _rows_of_range(files, columns, first, last):
        held.append(rows)
        n_held += len(rows[0])
        if n_held > limit:
            roots, doc_ids, left = _star_edges(held)
            yield roots, doc_ids
            held, n_held = [left], len(left[0])
            limit = max(limit, 2 * n_held)
    if held:
        roots, doc_ids, _ = _star_edges(held)
        yield roots, doc_ids


def _rows_of_range(
    files: Sequence[Path], columns: list[str], first: int, last: int
) -> Iterator[list[NDArray[np.generic]]]:
    """The rows whose first column is within first .. last, column by column; row groups without any are skipped."""
    for path in files:
        with open_rows(path) as file:
            groups = [i for i in range(file.num_row_groups) if _overlaps(file, i, columns[0], first, last)]
            for batch in file.iter_batches(_BATCH_ROWS, groups, columns=columns) if groups else ():
                arrays = [batch.column(column).to_numpy() for column in columns]
                inside = (arrays[0] >= np.uint64(first)) & (arrays[0] <= np.uint64(last))
                yield arrays if inside.all() else [array[inside] for array in arrays]


def _overlaps(file: pq.ParquetFile, group: int, column: str, first: int, last: int) -> bool:
    statistics = file.metadata.row_group(group).column(file.schema_arrow.get_field_index(column)).statistics
    if statistics is None or not statistics.has_min_max:
        return True
    return bool(statistics.min <= last and statistics.max >= first)


def _star_edges(
    held: list[list[NDArray[np.generic]]],
) -> tuple[Int64Array, Int64Array, list[NDArray[np.generic]]]:
    """Groups of equal keys -> (root, doc_id), each once, sorted; and the rows that are roots. Empties `held`."""
    columns = []
    for _ in range(len(held[0])):
        columns.append(np.concatenate([rows.pop(0) for rows in held]))
    doc_ids: Int64Array = columns[-1].astype(np.int64, copy=False)
    keys: UInt64Array = columns[0].astype(np.uint64, copy=False)
    second = columns[1].astype(np.uint64, copy=False) if len(columns) > 2 else np.empty(0, np.uint64)
    is_root = np.ones(len(keys), np.bool_)
    roots, members = _stars(keys, second, doc_ids, np.argsort(keys), is_root)
    n_edges = int(_make_distinct(roots, members, np.argsort(roots)))
    return roots[:n_edges], members[:n_edges], [column[is_root] for column in columns]


@compiled
def _smallest_equal(second: UInt64Array, doc_ids: Int64Array, rows: Int64Array, row: int) -> int:
    """The smallest document among the rows with the same second key; for two 64-bit hashes that are equal by chance."""
    smallest: int = doc_ids[row]
    for other in rows:
        if second[other] == second[row]:
            smallest = min(smallest, doc_ids[other])
    return smallest


@compiled
def _stars(
    keys: UInt64Array, second: UInt64Array, doc_ids: Int64Array, order: Int64Array, is_root: NDArray[np.bool_]
) -> tuple[Int64Array, Int64Array]:
    """For every row that is not the smallest document of its group: that document, and its own.

    A second key divides groups further where it is not empty; `is_root` becomes false for these rows.
    """
    n, n_edges = len(order), 0
    for i in range(1, n):
        n_edges += keys[order[i]] == keys[order[i - 1]]
    roots, members = np.empty(n_edges, np.int64), np.empty(n_edges, np.int64)
    n_edges, begin = 0, 0
    while begin < n:
        end = begin + 1
        while end < n and keys[order[end]] == keys[order[begin]]:
            end += 1
        smallest = doc_ids[order[begin]]
        divided = False
        for i in range(begin + 1, end):
            smallest = min(smallest, doc_ids[order[i]])
            divided |= len(second) > 0 and second[order[i]] != second[order[begin]]
        for i in range(begin, end):
            row = order[i]
            root = _smallest_equal(second, doc_ids, order[begin:end], row) if divided else smallest
            if root != doc_ids[row]:
                roots[n_edges], members[n_edges] = root, doc_ids[row]
                n_edges += 1
                is_root[row] = False
        begin = end
    return roots[:n_edges], members[:n_edges]


@compiled
def _make_distinct(roots: Int64Array, members: Int64Array, order: Int64Array) -> int:
    """Sort pairs by root, given their order by it, and by member, each pair once; in place. How many there are."""
    sorted_roots, sorted_members = roots[order], members[order]
    n_kept = 0
    begin, n = 0, len(order)
    while begin < n:
        end = begin + 1
        while end < n and sorted_roots[end] == sorted_roots[begin]:
            end += 1
        if end - begin > 1:
            sorted_members[begin:end].sort()
        for i in range(begin, end):
            if i == begin or sorted_members[i] != sorted_members[i - 1]:
                roots[n_kept], members[n_kept] = sorted_roots[i], sorted_members[i]
                n_kept += 1
        begin = end
    return n_kept


def _merge(statement: str, parts: list[str], spill: Path, path: Path, schema: pa.Schema) -> int:
    """Run a statement over the parts, under the memory limit, into a parquet file; its number of rows."""
    import duckdb

    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": 1,
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
    }
    try:
        with duckdb.connect(config=config) as connection, RowsWriter(path, schema) as writer:
            for batch in _batches(connection, statement, parts):
                writer.write(pa.Table.from_batches([batch]).cast(schema))
            return int(writer.n_rows)
    except duckdb.Error as error:
        raise DataError(f"merging the edges in {spill} failed: {error}") from error


def _batches(connection: duckdb.DuckDBPyConnection, statement: str, parts: list[str]) -> Iterator[pa.RecordBatch]:
    if parts:
        connection.execute("SET enable_progress_bar = false").fetchall()
        yield from connection.sql(statement, params=[parts] * statement.count("?")).to_arrow_reader(_BATCH_ROWS)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
