"""How long grouping takes and how much memory, on band rows made up for it."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.grouping import EDGES_FILE, partitions_of, write_edges
from data_pipeline.dedup.row_files import RowsWriter
from data_pipeline.dedup.signatures import BANDS_FILE, BANDS_ROW_GROUP, BANDS_SCHEMA, Runs
from data_pipeline.memory import peak_rss_bytes

BANDS = 14
COPIES = 0.3
"""Share of documents that are near-duplicates of another one, in all their bands."""

_SHARDS = 8
_BATCH_DOCUMENTS = 50_000


def measure_grouping(rows: int, folder: Path) -> dict[str, Any]:
    """Group so many band rows as a job would, one partition after the other, each in a fresh process.

    Args:
        rows: number of rows (band_key, doc_id), cut to whole documents of 14.
        folder: an empty folder on the disk to measure; 16 bytes a row and what DuckDB spills. Left empty.

    Returns:
        rows, partitions, copies (documents that are copies), copies_found, cpu_seconds, wall_seconds, peak_rss_bytes
        (of the worst partition), imports included.
    """
    shards = [folder / f"shard{i}" for i in range(_SHARDS)]
    copies = _write_shards(shards, rows // BANDS)
    n_partitions = partitions_of(rows)
    context = multiprocessing.get_context("spawn")
    begin, cpu, peak = time.perf_counter(), 0.0, 0
    edges = [folder / f"edges{i}" for i in range(n_partitions)]
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for i, target in enumerate(edges):
            target.mkdir()
            cpu_seconds, rss_bytes = pool.submit(_group, target, shards, (i, n_partitions)).result()
            cpu, peak = cpu + cpu_seconds, max(peak, rss_bytes)
    wall_seconds = time.perf_counter() - begin
    found: NDArray[np.int64] = np.empty(0, np.int64)
    for target in edges:
        found = np.union1d(found, pq.read_table(target / EDGES_FILE, columns=["doc_id"]).column(0).to_numpy())
    for path in [*shards, *edges]:
        shutil.rmtree(path)
    return {
        "rows": rows // BANDS * BANDS,
        "partitions": n_partitions,
        "copies": copies,
        "copies_found": len(found),
        "cpu_seconds": round(cpu, 2),
        "wall_seconds": round(wall_seconds, 2),
        "peak_rss_bytes": peak,
    }


def _group(target: Path, shards: list[Path], partition: tuple[int, int]) -> tuple[float, int]:
    write_edges(target, "near", shards, partition)
    return time.process_time(), peak_rss_bytes()


def _write_shards(shards: list[Path], n_documents: int) -> int:
    """Write the band keys of documents dealt out to shards; how many of them are copies of another one."""
    rng = np.random.default_rng(0)
    is_copy = rng.random(n_documents) < COPIES
    is_copy[0] = False
    content = np.arange(n_documents, dtype=np.uint64)
    content[is_copy] = rng.choice(np.flatnonzero(~is_copy), int(is_copy.sum()))
    content = rng.permutation(content)
    for ordinal, shard in enumerate(shards):
        shard.mkdir(parents=True)
        mine = content[ordinal :: len(shards)]
        with RowsWriter(shard / BANDS_FILE, BANDS_SCHEMA, BANDS_ROW_GROUP) as writer:
            runs = Runs(writer)
            for begin in range(0, len(mine), _BATCH_DOCUMENTS):
                batch = mine[begin : begin + _BATCH_DOCUMENTS]
                # Distinct multiples of an odd number: distinct keys, spread over the whole range.
                numbers = batch[:, None] * np.uint64(BANDS) + np.arange(1, BANDS + 1, dtype=np.uint64)
                keys = (numbers * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64, copy=False)
                runs.add(keys, (ordinal << 32) + np.arange(begin, begin + len(batch)))
            runs.flush()
    return int(is_copy.sum())
