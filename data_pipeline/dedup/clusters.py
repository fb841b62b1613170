"""Edges -> clusters -> which documents go.

Of each cluster one document is kept: of those with the highest source priority the first one or the longest. If a
document of the cluster was published by an earlier job, that one is the copy that stays, and all of this job go.

    clusters.parquet  every document of this job that is in a cluster, in rising doc_id:
                      doc_id, cluster (its smallest doc_id), cluster_size (published documents included), kept, reason
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.grouping import EDGES_FILE
from data_pipeline.dedup.minhash import compiled
from data_pipeline.dedup.nodes import Nodes
from data_pipeline.dedup.row_files import RowsWriter
from data_pipeline.dedup.signatures import SIGNATURES_FILE
from data_pipeline.parquet_reader import open_rows
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError

CLUSTERS_FILE = "clusters.parquet"
REASON_EXACT = "exact_duplicate"
REASON_NEAR = "near_duplicate"
REASON_PUBLISHED = "published_duplicate"

Int64Array = NDArray[np.int64]

CLUSTERS_SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("cluster", pa.int64()),
        ("cluster_size", pa.int64()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
    ]
)
_REASONS = ("", REASON_EXACT, REASON_NEAR, REASON_PUBLISHED)
_KEPT, _EXACT, _NEAR, _PUBLISHED = range(4)
_BATCH_ROWS = 1 << 17
# A preference is one number: the rank of the priority above the length in bytes.
_LENGTH_BITS = 48
_PREFER_PUBLISHED = np.iinfo(np.int64).max
_LARGEST_INT32 = np.iinfo(np.int32).max


def write_clusters(
    folder: Path,
    exact: Sequence[Path],
    near: Sequence[Path],
    signatures: Sequence[Path],
    priorities: Sequence[int],
    keep: str,
    published: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Counts:
    """Write clusters.parquet from the edges of exact and near duplicates together.

    In memory: 32 bytes for each document that has an edge, and two bits for each record of the sources.

    Args:
        folder: where to.
        exact: folders with edges of exact duplicates.
        near: folders with edges of near duplicates, verified or not.
        signatures: folders of signatures, in order of shards.
        priorities: priority of each shard's source, by the shard's ordinal; the highest is kept.
        keep: `first` or `longest` of those.
        published: folders of signatures of published documents, see `published.write_published`.
        progress: called with the bytes of edges read, and in the end with the number of documents.

    Raises:
        DataError: an edge names a document that has no signature.
    """
    nodes = Nodes([*signatures, *published])
    n_edges = 0
    for kind, ends, others in _edges(exact, near):
        if not (nodes.mark(ends) and nodes.mark(others)):
            raise DataError(
                f"an edge of {kind} duplicates names a document that has no signature: the files of stages/edges and "
                "stages/signatures are of different runs; remove stages/edges and run again"
            )
        n_edges += len(ends)
    forest = _Forest.of(nodes.number())
    for kind, ends, others in _edges(exact, near, progress):
        _unite(forest.root, nodes.of(ends), nodes.of(others))
        if kind == "exact":
            forest.exact_root[nodes.of(others)] = nodes.of(ends)
    _flatten(forest.root, forest.size)
    _choose_all(nodes, forest, signatures, _rank_of(priorities), keep)
    ids = nodes.ids()
    removed = _write(folder / CLUSTERS_FILE, nodes, forest, ids)
    n_documents = sum(_n_rows(path) for path in signatures)
    if progress is not None:
        progress(0, n_documents)
    rejected = {name: sum(shard.get(name, 0) for shard in removed.values()) for name in _REASONS[1:]}
    sizes = forest.size[: nodes.n_own()]
    detail = {
        "edges": n_edges,
        "clusters": int((sizes > 1).sum()),
        "cluster_sizes": _histogram(sizes[sizes > 1]),
        "removed_by_shard": {str(ordinal): reasons for ordinal, reasons in removed.items()},
    }
    return Counts(n_documents, n_documents - sum(rejected.values()), rejected, detail)


def read_clusters(path: Path, first_doc_id: int, last_doc_id: int) -> pa.Table:
    """The rows of clusters.parquet whose doc_id is within the range, ends included; only their row groups are read."""
    return pq.read_table(path, filters=[("doc_id", ">=", first_doc_id), ("doc_id", "<=", last_doc_id)])


def read_removed(path: Path, first_doc_id: int, last_doc_id: int) -> Int64Array:
    """The sorted ids of the documents of the range that go."""
    table = read_clusters(path, first_doc_id, last_doc_id)
    ids = table.column("doc_id").to_numpy()
    return np.asarray(ids[~table.column("kept").to_numpy(zero_copy_only=False).astype(np.bool_)], np.int64)


def is_removed(doc_ids: Int64Array, removed: Int64Array) -> NDArray[np.bool_]:
    """Which of `doc_ids` are among the sorted ids `removed`."""
    if not len(removed):
        return np.zeros(len(doc_ids), np.bool_)
    at = np.minimum(np.searchsorted(removed, doc_ids), len(removed) - 1)
    return np.asarray(removed[at] == doc_ids, np.bool_)


def connected_components(ends: Int64Array, other_ends: Int64Array, n_nodes: int) -> Int64Array:
    """The smallest node of each node's component, (n_nodes,), for edges (n_edges,) between nodes 0 .. n_nodes - 1.

    Source: Tarjan, van Leeuwen 1984, union-find with path halving; here the smaller root always wins, which makes
    the result independent of the order of edges.
    """
    root = np.arange(n_nodes, dtype=np.int64)
    _unite(root, ends, other_ends)
    _flatten(root, np.zeros(n_nodes, np.int64))
    return root


@dataclass(frozen=True)
class _Forest:
    """Arrays over the documents that have an edge, by number."""

    root: NDArray[np.signedinteger[Any]]
    """Smallest number of the cluster, once flattened."""
    exact_root: NDArray[np.signedinteger[Any]]
    """Smallest number of equal content."""
    size: NDArray[np.signedinteger[Any]]
    """At a root: number of documents of the cluster; 0 elsewhere."""
    best: NDArray[np.signedinteger[Any]]
    """At a root: the document that is kept."""
    preference: Int64Array
    """At a root: the preference of that document."""

    @classmethod
    def of(cls, n: int) -> _Forest:
        kind: type[np.int32 | np.int64] = np.int32 if n <= _LARGEST_INT32 else np.int64
        numbers: NDArray[np.signedinteger[Any]] = np.arange(n, dtype=kind)
        return cls(numbers, numbers.copy(), np.zeros(n, kind), np.zeros(n, kind), np.full(n, -1, np.int64))


def _edges(
    exact: Sequence[Path], near: Sequence[Path], progress: Progress | None = None
) -> Iterator[tuple[str, Int64Array, Int64Array]]:
    for kind, folders in (("exact", exact), ("near", near)):
        for folder in folders:
            with open_rows(folder / EDGES_FILE) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=["root", "doc_id"]):
                    yield kind, batch.column("root").to_numpy(), batch.column("doc_id").to_numpy()
            if progress is not None:
                progress((folder / EDGES_FILE).stat().st_size, 0)


def _rank_of(priorities: Sequence[int]) -> Callable[[int], int]:
    """Ordinal -> the rank of its priority, from 0; the ranks are small whatever the priorities."""
    ranks = {priority: rank for rank, priority in enumerate(sorted(set(priorities)))}
    return lambda ordinal: ranks[priorities[ordinal]]


def _choose_all(
    nodes: Nodes, forest: _Forest, signatures: Sequence[Path], rank_of: Callable[[int], int], keep: str
) -> None:
    lengths = _lengths(nodes, signatures) if keep == "longest" else {}
    for ordinal, begin, end in nodes.ranges():
        if ordinal < 0:
            preference = np.full(end - begin, _PREFER_PUBLISHED, np.int64)
        else:
            preference = np.full(end - begin, rank_of(ordinal) << _LENGTH_BITS if end > begin else 0, np.int64)
            if ordinal in lengths:
                preference += lengths[ordinal](begin, end)
        _choose(begin, preference, forest.root, forest.best, forest.preference)


def _lengths(nodes: Nodes, signatures: Sequence[Path]) -> Mapping[int, Callable[[int, int], Int64Array]]:
    """Ordinal -> a function that reads the lengths of a shard's documents, given the range of their numbers."""

    def reader(path: Path) -> Callable[[int, int], Int64Array]:
        def read(begin: int, end: int) -> Int64Array:
            result = np.zeros(end - begin, np.int64)
            with open_rows(path / SIGNATURES_FILE) as file:
                for batch in file.iter_batches(_BATCH_ROWS, columns=["doc_id", "text_bytes"]):
                    numbers = nodes.of(batch.column("doc_id").to_numpy())
                    result[numbers[numbers >= 0] - begin] = batch.column("text_bytes").to_numpy()[numbers >= 0]
            return result

        return read

    return {_first_doc_id(path) >> 32: reader(path) for path in signatures if _n_rows(path)}


def _first_doc_id(folder: Path) -> int:
    with open_rows(folder / SIGNATURES_FILE) as file:
        return int(file.metadata.row_group(0).column(0).statistics.min)


def _n_rows(folder: Path) -> int:
    with open_rows(folder / SIGNATURES_FILE) as file:
        return int(file.metadata.num_rows)


def _write(path: Path, nodes: Nodes, forest: _Forest, ids: Int64Array) -> dict[int, dict[str, int]]:
    """Write the rows of this job's documents; ordinal of a shard -> reason -> how many of its documents go."""
    removed: dict[int, dict[str, int]] = {}
    names = pa.array(_REASONS, pa.string())
    with RowsWriter(path, CLUSTERS_SCHEMA) as writer:
        for ordinal, first, last in nodes.ranges():
            if ordinal < 0:
                continue
            counts = np.zeros(len(_REASONS), np.int64)
            for begin in range(first, last, _BATCH_ROWS):
                end = min(begin + _BATCH_ROWS, last)
                roots = forest.root[begin:end]
                reasons = _reasons(begin, roots, forest, ids)
                columns = [ids[begin:end], ids[roots], forest.size[roots].astype(np.int64), reasons == _KEPT]
                writer.write(pa.table([*columns, names.take(pa.array(reasons))], schema=CLUSTERS_SCHEMA))
                counts += np.bincount(reasons, minlength=len(_REASONS))
            if counts[1:].any():
                removed[ordinal] = {name: int(n) for name, n in zip(_REASONS[1:], counts[1:], strict=True) if n}
    return removed


def _reasons(begin: int, roots: NDArray[np.signedinteger[Any]], forest: _Forest, ids: Int64Array) -> Int64Array:
    """Index into _REASONS for the documents begin, begin + 1, ...

    A document is an exact duplicate if its content is that of the kept one, or of a smaller document of its cluster.
    """
    numbers = np.arange(begin, begin + len(roots))
    kept, exact_root = forest.best[roots], forest.exact_root[begin : begin + len(roots)]
    is_exact = (exact_root == forest.exact_root[kept]) | (exact_root != numbers)
    reasons = np.where(is_exact, _EXACT, _NEAR)
    reasons[kept == numbers] = _KEPT
    reasons[ids[kept] < 0] = _PUBLISHED
    return reasons


def _histogram(sizes: NDArray[np.signedinteger[Any]]) -> dict[str, int]:
    """Clusters by size in powers of two: "2", "3-4", "5-8" ..."""
    histogram: dict[str, int] = {}
    low, high = 2, 2
    while len(sizes) and low <= sizes.max():
        label = str(low) if low == high else f"{low}-{high}"
        histogram[label] = int(((sizes >= low) & (sizes <= high)).sum())
        low, high = high + 1, 2 * high
    return histogram


@compiled
def _unite(root: NDArray[np.signedinteger[Any]], ends: Int64Array, other_ends: Int64Array) -> None:
    for i in range(len(ends)):
        a, b = ends[i], other_ends[i]
        while root[a] != a:
            root[a] = root[root[a]]
            a = root[a]
        while root[b] != b:
            root[b] = root[root[b]]
            b = root[b]
        if a < b:
            root[b] = a
        else:
            root[a] = b


@compiled
def _flatten(root: NDArray[np.signedinteger[Any]], size: NDArray[np.signedinteger[Any]]) -> None:
    """Point every node at its root, and count at the roots; a parent is smaller, so one pass from below is enough."""
    for i in range(len(root)):
        root[i] = root[root[i]]
        size[root[i]] += 1


@compiled
def _choose(
    begin: int,
    preferences: Int64Array,
    root: NDArray[np.signedinteger[Any]],
    best: NDArray[np.signedinteger[Any]],
    highest: Int64Array,
) -> None:
    for i in range(len(preferences)):
        at = root[begin + i]
        if preferences[i] > highest[at]:
            highest[at] = preferences[i]
            best[at] = begin + i
