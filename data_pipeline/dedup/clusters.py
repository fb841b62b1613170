"""Edges -> clusters -> which documents go: everything but the smallest id of each cluster.

Document ids count shards in the order of the job's sources, so the smallest id is the copy of the earliest source.

    removed.parquet   doc_id, reason (exact | near), cluster (id of the document that is kept), cluster_size
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.grouping import EDGES_FILE
from data_pipeline.tasks import Counts, Progress

REMOVED_FILE = "removed.parquet"
REASON_EXACT = "exact_duplicate"
REASON_NEAR = "near_duplicate"

Int64Array = NDArray[np.int64]

_SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("reason", pa.string()),
        ("cluster", pa.int64()),
        ("cluster_size", pa.int64()),
    ]
)


def connected_components(ends: Int64Array, other_ends: Int64Array, n_nodes: int) -> Int64Array:
    """The smallest node of each node's component; union-find with full path compression, all edges at a time.

    Source: Shiloach, Vishkin 1982, hooking and pointer jumping; here the smaller root always wins.

    Args:
        ends: (n_edges,), nodes 0 .. n_nodes - 1.
        other_ends: (n_edges,).
        n_nodes: number of nodes.

    Returns:
        (n_nodes,).
    """
    parent = np.arange(n_nodes, dtype=np.int64)
    while True:
        left, right = parent[ends], parent[other_ends]
        apart = left != right
        if not apart.any():
            return parent
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
        while True:
            grandparent = parent[parent]
            if np.array_equal(grandparent, parent):
                break
            parent = grandparent


def write_removed(
    folder: Path, exact: Sequence[Path], near: Sequence[Path], n_documents: int, progress: Progress | None = None
) -> Counts:
    """Write removed.parquet from the edges of exact and near duplicates together.

    Args:
        folder: where to.
        exact: folders with edges of exact duplicates.
        near: folders with edges of near duplicates.
        n_documents: documents that entered deduplication, for the count of what stays.
        progress: called once, at the end.
    """
    exact_roots, exact_ids = _read(exact)
    near_roots, near_ids = _read(near)
    ends, other_ends = np.concatenate([exact_roots, near_roots]), np.concatenate([exact_ids, near_ids])
    nodes = np.unique(np.concatenate([ends, other_ends]))
    root = connected_components(np.searchsorted(nodes, ends), np.searchsorted(nodes, other_ends), len(nodes))
    sizes = np.bincount(root, minlength=len(nodes))
    goes = root != np.arange(len(nodes))
    is_exact = np.isin(nodes[goes], exact_ids)
    reasons = np.where(is_exact, REASON_EXACT, REASON_NEAR)
    table = pa.table(
        {
            "doc_id": nodes[goes],
            "reason": pa.array(reasons.tolist(), pa.string()),
            "cluster": nodes[root[goes]],
            "cluster_size": sizes[root[goes]],
        },
        schema=_SCHEMA,
    )
    pq.write_table(table, folder / REMOVED_FILE, compression="zstd")
    if progress is not None:
        progress(0, n_documents)
    rejected = {REASON_EXACT: int(is_exact.sum()), REASON_NEAR: int((~is_exact).sum())}
    detail = {
        "edges": len(ends),
        "clusters": int((sizes > 1).sum()),
        "cluster_sizes": _histogram(sizes[sizes > 1]),
    }
    return Counts(n_documents, n_documents - int(goes.sum()), rejected, detail)


def read_removed(path: Path) -> Int64Array:
    """The ids of removed.parquet, sorted."""
    return np.asarray(pq.read_table(path, columns=["doc_id"]).column("doc_id").to_numpy(), np.int64)


def is_removed(doc_ids: Int64Array, removed: Int64Array) -> NDArray[np.bool_]:
    """Which of `doc_ids` are among the sorted ids `removed`."""
    if not len(removed):
        return np.zeros(len(doc_ids), np.bool_)
    at = np.minimum(np.searchsorted(removed, doc_ids), len(removed) - 1)
    return np.asarray(removed[at] == doc_ids, np.bool_)


def _read(folders: Sequence[Path]) -> tuple[Int64Array, Int64Array]:
    tables = [pq.read_table(folder / EDGES_FILE) for folder in folders]
    if not tables:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    table = pa.concat_tables(tables)
    return table.column("root").to_numpy(), table.column("doc_id").to_numpy()


def _histogram(sizes: Int64Array) -> dict[str, int]:
    """Clusters by size in powers of two: "2", "3-4", "5-8" ..."""
    histogram: dict[str, int] = {}
    low, high = 2, 2
    while len(sizes) and low <= sizes.max():
        label = str(low) if low == high else f"{low}-{high}"
        histogram[label] = int(((sizes >= low) & (sizes <= high)).sum())
        low, high = high + 1, 2 * high
    return histogram
