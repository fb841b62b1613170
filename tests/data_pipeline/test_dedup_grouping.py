import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.dedup import grouping
from data_pipeline.dedup.grouping import CANDIDATES_FILE, EDGES_FILE, partitions_of, write_edges
from data_pipeline.dedup.minhash import MinHasher
from data_pipeline.dedup.signatures import (
    BANDS_FILE,
    BANDS_SCHEMA,
    RUN_ROWS,
    SIGNATURES_FILE,
    SIGNATURES_SCHEMA,
    write_signatures,
)
from tests.data_pipeline.dedup_oracle import random_text, write_documents

ROOT = Path(__file__).resolve().parents[2]
KEYS = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def write_bands(folder: Path, rows: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    columns = [pa.array([r[0] for r in rows], pa.uint64()), pa.array([r[1] for r in rows], pa.int64())]
    pq.write_table(pa.table(columns, schema=BANDS_SCHEMA), folder / BANDS_FILE, row_group_size=3)
    return folder


def edges_of(folder: Path, kind: str, shards: list[Path], n_partitions: int) -> list[set[tuple[int, int]]]:
    found = []
    for i in range(n_partitions):
        target = folder / f"edges{i}"
        target.mkdir()
        write_edges(target, kind, shards, (i, n_partitions), with_candidates=True)
        rows = [(row["root"], row["doc_id"]) for row in pq.read_table(target / EDGES_FILE).to_pylist()]
        assert rows == sorted(set(rows))
        candidates = pq.read_table(target / CANDIDATES_FILE).column("doc_id").to_pylist()
        assert candidates == sorted({i for row in rows for i in row})
        assert sorted(p.name for p in target.iterdir()) == [CANDIDATES_FILE, EDGES_FILE]
        found.append(set(rows))
    return found


def stars(rows: list[tuple]) -> set[tuple[int, int]]:
    groups = defaultdict(set)
    for *key, doc_id in rows:
        groups[tuple(key)].add(doc_id)
    return {(min(g), i) for g in groups.values() for i in g if i != min(g)}


band_rows = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(-3, 20)), max_size=40, unique=True)


@given(st.lists(band_rows, min_size=1, max_size=3), st.integers(1, 3), st.sampled_from([2, 5, 100]))
@settings(deadline=None, max_examples=40)
def test_edges_are_the_stars_of_all_groups_whatever_the_partitions_and_passes(
    tmp_path_factory, shards: list[list[tuple[int, int]]], n_partitions: int, rows_per_pass: int
):
    folder = tmp_path_factory.mktemp("case")
    folders = [write_bands(folder / f"shard{i}", sorted(rows)) for i, rows in enumerate(shards)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "ROWS_PER_PASS", rows_per_pass)
        found = edges_of(folder, "near", folders, n_partitions)
    rows = [row for shard in shards for row in shard]
    first = [[r for r in rows if r[0] * n_partitions >> 64 == i] for i in range(n_partitions)]
    if rows_per_pass == 100:
        assert found == [stars(part) for part in first]
    # Where one key has more rows than a pass holds, a root may be that of the first files only; groups are the same.
    for edges, part in zip(found, first, strict=True):
        assert {i for edge in edges for i in edge} == {i for edge in stars(part) for i in edge}


def test_a_key_with_more_rows_than_a_pass_holds_makes_one_star(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grouping, "ROWS_PER_PASS", 10)
    monkeypatch.setattr(grouping, "_BATCH_ROWS", 7)
    shards = [write_bands(tmp_path / f"s{s}", [(5, 1000 * s + i) for i in range(100)]) for s in range(3)]
    assert edges_of(tmp_path, "near", shards, 1) == [
        {(0, 1000 * s + i) for s in range(3) for i in range(100)} - {(0, 0)}
    ]


def test_content_hashes_are_equal_only_if_both_halves_are(tmp_path: Path):
    rows = [(7, 1, 10), (7, 2, 11), (7, 1, 12), (7, 2, 13), (8, 1, 14), (9, 3, 15), (9, 3, 16)]
    table = [{"doc_id": d, "hash_high": h, "hash_low": low, "n_words": 1, "text_bytes": 1} for h, low, d in rows]
    pq.write_table(pa.Table.from_pylist(table, SIGNATURES_SCHEMA), tmp_path / SIGNATURES_FILE)
    assert edges_of(tmp_path, "exact", [tmp_path], 1) == [{(10, 12), (11, 13), (15, 16)}]


def test_a_partition_reads_only_the_row_groups_that_hold_its_keys(tmp_path: Path):
    """Whoever reads further than that runs into the damage."""
    n = 1 << 17
    keys = np.arange(n, dtype=np.uint64) * np.uint64((1 << 64) // n)
    keys[1::2] = keys[::2]
    path = tmp_path / BANDS_FILE
    pq.write_table(pa.table([keys, np.arange(n)], schema=BANDS_SCHEMA), path, row_group_size=1000, compression="zstd")
    with pq.ParquetFile(path) as file:
        last = file.metadata.row_group(120).column(1)
    with path.open("r+b") as raw:
        raw.seek(last.data_page_offset)
        raw.write(b"\xff" * 60)
    for i, target in enumerate([tmp_path / "low", tmp_path / "high"]):
        target.mkdir()
        if i == 0:
            assert write_edges(target, "near", [tmp_path], (0, 2)).detail["edges"] == n // 4
        else:
            with pytest.raises(OSError, match="eserializ"):
                write_edges(target, "near", [tmp_path], (1, 2))


def test_band_keys_are_written_in_sorted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_pipeline.dedup.signatures.RUN_ROWS", 10_000)
    documents = write_documents(tmp_path / "docs.parquet", {i: random_text(i, 12) for i in range(4000)})
    write_signatures(tmp_path, documents, MinHasher(5, 14, 8))
    table = pq.read_table(tmp_path / BANDS_FILE)
    keys = table.column("band_key").to_numpy()
    assert len(keys) == 4000 * 14
    assert 1 <= (keys[1:] < keys[:-1]).sum() <= 5
    assert sorted(table.column("doc_id").to_pylist()) == sorted(list(range(4000)) * 14)


def test_partitions_follow_from_the_rows():
    assert [partitions_of(n) for n in (0, 49_999_999, 120_000_000)] == [1, 1, 3]
    assert RUN_ROWS * 16 < 50e6


def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_no_spill(tmp_path: Path):
    write_bands(tmp_path / "shard", [(i // 2, i) for i in range(20_000)])
    (tmp_path / "out").mkdir()
    script = f"""
import resource, signal
from pathlib import Path
from data_pipeline.dedup.grouping import write_edges
from megagpt.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
folder = Path({str(tmp_path)!r})
try:
    write_edges(folder / "out", "near", [folder / "shard"], (0, 1))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cannot write into" in done.stdout
    assert str(tmp_path / "out") in done.stdout
    assert not (tmp_path / "out" / "spill").exists()
