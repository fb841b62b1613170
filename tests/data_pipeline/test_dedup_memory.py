"""Memory of the work functions at ten times the input, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.bench.grouping import measure_grouping
from data_pipeline.dedup.grouping import EDGES_FILE, EDGES_SCHEMA
from data_pipeline.dedup.row_files import RowsWriter
from data_pipeline.dedup.signatures import SIGNATURES_FILE, SIGNATURES_SCHEMA
from tests.data_pipeline.dedup_oracle import random_text

ROOT = Path(__file__).resolve().parents[2]
PEAK = "\nfrom data_pipeline.memory import peak_rss_bytes; print(peak_rss_bytes() >> 20)"


def peak_mb(script: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", "from pathlib import Path\n" + script + PEAK],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def write_many_documents(path: Path, n: int) -> None:
    texts = [random_text(seed, 60) for seed in range(1000)]
    with pq.ParquetWriter(path, pa.schema([("doc_id", pa.int64()), ("text", pa.string())])) as writer:
        for begin in range(0, n, 1000):
            text = pa.array([f"{begin} {text}" for text in texts])
            writer.write_table(pa.table({"doc_id": np.arange(begin, begin + 1000), "text": text}))


def test_signatures_of_ten_times_the_documents_take_no_more_memory(tmp_path: Path):
    """With runs as short against the input as they are against a shard of some million documents."""
    peaks = []
    for n in (20_000, 200_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        write_many_documents(folder / "docs.parquet", n)
        peaks.append(
            peak_mb(
                "from data_pipeline.dedup import signatures, minhash\n"
                "signatures.RUN_ROWS = 100_000\n"
                f"folder = Path({str(folder)!r})\n"
                "signatures.write_signatures(folder, folder / 'docs.parquet', minhash.MinHasher(5, 14, 8))"
            )
        )
    # Held whole, the band rows of 180,000 more documents would take 40 MB and sorting them three times as much.
    assert peaks[1] - peaks[0] < 40, peaks


def write_star_edges(folder: Path, n_documents: int) -> None:
    """A thousand shards' worth of ids in one: every document is in a cluster of four, and has three edges or one."""
    folder.mkdir()
    ids = np.arange(n_documents)
    zeros = np.zeros(n_documents, np.uint64)
    with RowsWriter(folder / SIGNATURES_FILE, SIGNATURES_SCHEMA) as writer:
        writer.write(pa.table([ids, zeros, zeros, ids, ids], schema=SIGNATURES_SCHEMA))
    members = ids[ids % 4 != 0]
    with RowsWriter(folder / EDGES_FILE, EDGES_SCHEMA) as writer:
        writer.write(pa.table([members - members % 4, members], schema=EDGES_SCHEMA))


def test_clusters_take_at_most_forty_bytes_a_document_in_a_cluster(tmp_path: Path):
    peaks = []
    sizes = (100_000, 1_000_000)
    for n in sizes:
        folder = tmp_path / str(n)
        write_star_edges(folder, n)
        peaks.append(
            peak_mb(
                "from data_pipeline.dedup.clusters import write_clusters\n"
                f"folder = Path({str(folder)!r})\n"
                "counts = write_clusters(folder, [], [folder, folder], [folder], [0], 'longest')\n"
                f"assert counts.documents_out == {n} // 4"
            )
        )
    assert peaks[1] - peaks[0] < 40 * (sizes[1] - sizes[0]) / 2**20 + 10, peaks


@pytest.mark.parametrize("n_rows", [1_400_000])
def test_grouping_finds_the_copies_and_stays_under_its_cap(tmp_path: Path, n_rows: int):
    measured = measure_grouping(n_rows, tmp_path)
    assert measured["rows"] == n_rows
    assert measured["copies_found"] == measured["copies"] > 0.28 * n_rows / 14
    assert measured["peak_rss_bytes"] < 700e6
    assert measured["cpu_seconds"] > 0
    assert list(tmp_path.iterdir()) == []
