"""Shards of documents as the filters leave them, for the tests of passage dedup."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.first_occurrence import REPEATS_FILE, write_repeated_anchors, write_repeats
from data_pipeline.dedup.substrings import write_anchors, write_windows
from data_pipeline.dedup.units import write_units
from data_pipeline.parquet_writer import DOCUMENT_SCHEMA

Spans = dict[int, list[tuple[int, int]]]


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def write_shard(path: Path, texts: Mapping[int, str], group_rows: int = 3) -> Path:
    """docs.parquet in small row groups; texts by document id."""
    rows = [
        {"doc_id": i, "text": text, "source": f"s{i >> 32}", "url": f"u{i}", "meta": json.dumps({"n": str(i)})}
        for i, text in sorted(texts.items())
    ]
    pq.write_table(pa.Table.from_pylist(rows, DOCUMENT_SCHEMA), path, row_group_size=group_rows)
    return path


def write_clusters_file(path: Path, rows: Sequence[tuple[int, int, int, bool, str]]) -> Path:
    """clusters.parquet of rows (doc_id, cluster, cluster_size, kept, reason)."""
    names = {"doc_id": pa.int64(), "cluster": pa.int64(), "cluster_size": pa.int64(), "kept": pa.bool_()}
    schema = pa.schema([*names.items(), ("reason", pa.string())])
    columns = zip(*sorted(rows), strict=True) if rows else [[]] * 5
    pq.write_table(pa.table([list(column) for column in columns], schema=schema), path)
    return path


def grouped(folder: Path, stage: str, work: Callable, shards: Sequence[Path], n_partitions: int) -> list[Path]:
    folders = [make(folder / f"{stage}-{i}") for i in range(n_partitions)]
    for i, out in enumerate(folders):
        work(out, shards, (i, n_partitions))
    return folders


def unit_spans(
    folder: Path,
    shards: Sequence[Path],
    unit: str,
    min_words: int = 1,
    n_partitions: int = 1,
    clusters: Path | None = None,
) -> list[Path]:
    """Both stages; the files of repeats."""
    outs = [make(folder / f"units-{i}") for i in range(len(shards))]
    for out, shard in zip(outs, shards, strict=True):
        write_units(out, shard, clusters, unit, min_words)
    return [out / REPEATS_FILE for out in grouped(folder, "unit-groups", write_repeats, outs, n_partitions)]


def substring_spans(
    folder: Path, shards: Sequence[Path], n_tokens: int, n_partitions: int = 1, clusters: Path | None = None
) -> list[Path]:
    """All four stages; the files of repeats."""
    anchors = [make(folder / f"anchors-{i}") for i in range(len(shards))]
    for out, shard in zip(anchors, shards, strict=True):
        write_anchors(out, shard, clusters, n_tokens)
    repeated = grouped(folder, "anchor-groups", write_repeated_anchors, anchors, n_partitions)
    windows = [make(folder / f"windows-{i}") for i in range(len(shards))]
    for out, shard in zip(windows, shards, strict=True):
        write_windows(out, shard, clusters, repeated, n_tokens)
    return [out / REPEATS_FILE for out in grouped(folder, "window-groups", write_repeats, windows, n_partitions)]


def read_spans(files: Sequence[Path]) -> Spans:
    """The union of all files, by document; joined in plain Python."""
    rows = sorted(
        (row["doc_id"], row["start"], row["end"]) for file in files for row in pq.read_table(file).to_pylist()
    )
    spans: Spans = {}
    for doc_id, start, end in rows:
        known = spans.setdefault(doc_id, [])
        if known and start <= known[-1][1]:
            known[-1] = (known[-1][0], max(known[-1][1], end))
        else:
            known.append((start, end))
    return spans
