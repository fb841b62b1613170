"""Rows with equal keys -> edges from the smallest document id of each group to the others.

DuckDB does the grouping under a memory limit and spills beyond it. All SQL of the project is in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.signatures import BANDS_FILE, SIGNATURES_FILE
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError

EDGES_FILE = "edges.parquet"
MEMORY_LIMIT = "1GB"

_KEYS = 1 << 64
# One statement: groups of more than one row, joined back, each pair once, in a fixed order.
_STAR_EDGES = """
    WITH keyed AS (SELECT {key}, doc_id FROM read_parquet(?) WHERE {first} BETWEEN ?::UBIGINT AND ?::UBIGINT),
         groups AS (SELECT {key}, min(doc_id) AS root FROM keyed GROUP BY {key} HAVING count(*) > 1)
    SELECT DISTINCT root, doc_id FROM keyed JOIN groups USING ({key}) WHERE doc_id <> root ORDER BY root, doc_id
"""


def write_edges(
    folder: Path, kind: str, shards: Sequence[Path], partition: tuple[int, int], progress: Progress | None = None
) -> Counts:
    """Write edges.parquet (root, doc_id) for one partition of the keys.

    Args:
        folder: where to.
        kind: `exact`: equal content hash; `near`: equal key of a band.
        shards: folders of signatures.
        partition: (number of this partition, number of partitions); the keys are cut into equal ranges.
        progress: called once, at the end.

    Raises:
        DataError: the disk is full, or another failure of DuckDB.
    """
    number, n_partitions = partition
    first, last = _KEYS * number // n_partitions, _KEYS * (number + 1) // n_partitions - 1
    columns = ("hash_high", "hash_low") if kind == "exact" else ("band_key",)
    statement = _STAR_EDGES.format(key=", ".join(columns), first=columns[0])
    files = [str(shard / (SIGNATURES_FILE if kind == "exact" else BANDS_FILE)) for shard in shards]
    spill = folder / "spill"
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY_LIMIT,
        "threads": 1,
        "temp_directory": str(spill),
        "preserve_insertion_order": False,
    }
    try:
        with duckdb.connect(config=config) as connection:
            edges: pa.Table = connection.sql(statement, params=[files, first, last]).to_arrow_table()
    except duckdb.Error as error:
        raise DataError(f"grouping {len(files)} signature files of {kind} duplicates failed: {error}") from error
    edges = edges.cast(pa.schema([("root", pa.int64()), ("doc_id", pa.int64())]))
    pq.write_table(edges, folder / EDGES_FILE, compression="zstd")
    _remove_spill(spill)
    if progress is not None:
        progress(sum(Path(file).stat().st_size for file in files), edges.num_rows)
    return Counts(0, 0, detail={"edges": edges.num_rows})


def _remove_spill(spill: Path) -> None:
    if spill.is_dir():
        for path in spill.iterdir():
            path.unlink()
        spill.rmdir()
