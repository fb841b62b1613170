"""True Jaccard similarity of candidate pairs: what the bands propose, the shingles decide.

    shingles    per shard: the shingle sets of the documents that are candidates
    verify      per partition of near edges: the edges that hold

A star of edges holds every pair that shares a band key of this partition: two documents of one group have the same
root. Within a star, each member is compared with the members before it that it is not connected with yet, at most
`MOST_COMPARISONS` of them, first members of their cluster first. So only verified pairs are joined: where A ~ B and
C ~ D hold and nothing across, there are two clusters. Up to that many members, the result is exactly the connected
components of the pairs that reach the threshold; beyond, a pair may be missed whose members resemble no first member.

    shingles.npy         uint64, the sets one after the other, each sorted
    shingle_ends.npy     int64 (n + 1,)
    shingle_doc_ids.npy  int64 (n,), rising
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.dedup.clusters import is_removed as is_among
from data_pipeline.dedup.grouping import CANDIDATES_FILE, EDGES_FILE, EDGES_SCHEMA
from data_pipeline.dedup.minhash import compiled, shingle_set
from data_pipeline.dedup.row_files import RowsWriter
from data_pipeline.dedup.signatures import utf8_of
from data_pipeline.parquet_reader import open_rows
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError

SHINGLES_FILE = "shingles.npy"
ENDS_FILE = "shingle_ends.npy"
DOC_IDS_FILE = "shingle_doc_ids.npy"
MOST_COMPARISONS = 64
"""Comparisons of one member of a star; a comparison reads two shingle sets."""

_ORDINAL_SHIFT = 32
_RECORDS = (1 << _ORDINAL_SHIFT) - 1
_BATCH_DOCUMENTS = 256
_BATCH_ROWS = 1 << 17
_MOST_OPEN_SHARDS = 256

Int64Array = NDArray[np.int64]
UInt64Array = NDArray[np.uint64]


def write_shingles(
    folder: Path,
    documents: Path,
    near: Sequence[Path],
    ngram: int,
    ordinal: int | None = None,
    progress: Progress | None = None,
) -> Counts:
    """Write the shingle sets of a shard's candidates. In memory: a batch of texts, and 24 bytes a candidate.

    Args:
        folder: where to.
        documents: docs.parquet of the shard.
        near: folders with candidates.parquet of the near duplicates, of all partitions.
        ngram: words of a shingle.
        ordinal: of a published shard: its negative ordinal, see `published.PublishedShard`.
        progress: called with bytes of text and documents looked at.
    """
    doc_ids, ends = [np.empty(0, np.int64)], [0]
    candidates: Int64Array | None = None
    with open_rows(documents) as file, (folder / "hashes").open("wb+") as hashes:
        for batch in file.iter_batches(_BATCH_DOCUMENTS, columns=["doc_id", "text"]):
            ids = batch.column("doc_id").to_numpy()
            if ordinal is not None:
                ids = (ids & _RECORDS) + (ordinal << _ORDINAL_SHIFT)
            if candidates is None:
                candidates = _candidates(near, int(ids[0]) >> _ORDINAL_SHIFT)
            text, text_ends = utf8_of(batch.column("text"))
            chosen = np.flatnonzero(is_among(ids, candidates))
            for i in chosen.tolist():
                shingles = shingle_set(text[text_ends[i] : text_ends[i + 1]], ngram)
                hashes.write(shingles.astype("<u8").tobytes())
                ends.append(ends[-1] + len(shingles))
            doc_ids.append(ids[chosen])
            if progress is not None:
                progress(int(text_ends[-1] - text_ends[0]), len(ids))
        _write_array(hashes, folder / SHINGLES_FILE, ends[-1])
    (folder / "hashes").unlink()
    np.save(folder / ENDS_FILE, np.array(ends, np.int64))
    np.save(folder / DOC_IDS_FILE, np.concatenate(doc_ids))
    return Counts(0, 0, detail={"candidates": len(ends) - 1, "shingles": ends[-1]})


def _candidates(near: Sequence[Path], ordinal: int) -> Int64Array:
    first, last = ordinal << _ORDINAL_SHIFT, ((ordinal + 1) << _ORDINAL_SHIFT) - 1
    found = [
        pq.read_table(folder / CANDIDATES_FILE, filters=[("doc_id", ">=", first), ("doc_id", "<=", last)])
        for folder in near
    ]
    return np.unique(np.concatenate([np.empty(0, np.int64), *(t.column("doc_id").to_numpy() for t in found)]))


def _write_array(raw: BinaryIO, path: Path, n: int) -> None:
    """Copy numbers from a file without a header into an .npy file, block by block."""
    raw.seek(0)
    with path.open("wb") as file:
        header = {"descr": "<u8", "fortran_order": False, "shape": (n,)}
        np.lib.format.write_array_header_1_0(file, header)
        while block := raw.read(1 << 22):
            file.write(block)


def write_verified(
    folder: Path, edges: Path, shingles: Sequence[Path], threshold: float, progress: Progress | None = None
) -> Counts:
    """Write edges.parquet with the verified edges of one partition of near edges.

    In memory: the edges of one star, and the shingle sets that its comparisons touch, mapped from their files.

    Args:
        folder: where to.
        edges: folder with the edges of the partition.
        shingles: folders of shingle sets, of all shards, published ones included.
        threshold: lowest Jaccard similarity of a duplicate.
        progress: called with bytes of edges read.

    Raises:
        DataError: a candidate has no shingle set.
    """
    sets = _ShingleSets(shingles)
    n_candidates = n_compared = 0
    with RowsWriter(folder / EDGES_FILE, EDGES_SCHEMA) as writer:
        for members in _stars(edges / EDGES_FILE):
            n_candidates += len(members) - 1
            ends, others, n = _verify_star(members, sets, threshold)
            n_compared += n
            if ends:
                writer.write(pa.table([np.array(ends), np.array(others)], schema=EDGES_SCHEMA))
        n_verified = writer.n_rows
    if progress is not None:
        progress((edges / EDGES_FILE).stat().st_size, 0)
    return Counts(0, 0, detail={"edges": n_verified, "candidates": n_candidates, "compared": n_compared})


def _stars(path: Path) -> Iterator[Int64Array]:
    """Root and other members of each star; edges lie sorted by root."""
    root: int | None = None
    parts: list[Int64Array] = []
    with open_rows(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=["root", "doc_id"]):
            roots, doc_ids = batch.column("root").to_numpy(), batch.column("doc_id").to_numpy()
            cuts = np.flatnonzero(roots[1:] != roots[:-1]) + 1
            for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(roots)], strict=True):
                if root is not None and roots[begin] != root:
                    yield np.concatenate([np.array([root]), *parts])
                    parts = []
                root = int(roots[begin])
                parts.append(doc_ids[begin:end].copy())
    if root is not None:
        yield np.concatenate([np.array([root]), *parts])


def _verify_star(members: Int64Array, sets: _ShingleSets, threshold: float) -> tuple[list[int], list[int], int]:
    """Edges between members whose shingle sets are similar enough, and how many pairs were compared."""
    edges: list[tuple[int, int]] = []
    n_compared = 0
    clusters: list[list[int]] = []
    for doc_id in members.tolist():
        mine = sets.of(doc_id)
        joined: list[list[int]] = []
        left, depth = MOST_COMPARISONS, 0
        # The first members of all clusters, then the second ones of those that are still apart, and so on.
        apart = clusters[:left]
        while apart and left:
            further = []
            for cluster in apart[:left]:
                left -= 1
                n_compared += 1
                if jaccard(mine, sets.of(cluster[depth])) >= threshold:
                    joined.append(cluster)
                    edges.append((cluster[depth], doc_id))
                elif len(cluster) > depth + 1:
                    further.append(cluster)
            apart, depth = further, depth + 1
        _join(clusters, joined, doc_id)
    return [min(edge) for edge in edges], [max(edge) for edge in edges], n_compared


def _join(clusters: list[list[int]], joined: list[list[int]], doc_id: int) -> None:
    """Make one cluster of those that a document joins, where the first of them stands."""
    if not joined:
        clusters.append([doc_id])
        return
    first, *rest = joined
    for cluster in rest:
        first.extend(cluster)
        clusters[:] = [other for other in clusters if other is not cluster]
    first.append(doc_id)


class _ShingleSets:
    """Document id -> its sorted shingle hashes, mapped; so many shards at a time stay open."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders: dict[int, Path] = {}
        for folder in folders:
            doc_ids = np.load(folder / DOC_IDS_FILE, mmap_mode="r")
            if len(doc_ids):
                self._folders[int(doc_ids[0]) >> _ORDINAL_SHIFT] = folder
        self._open: OrderedDict[int, tuple[Int64Array, Int64Array, UInt64Array]] = OrderedDict()

    def of(self, doc_id: int) -> UInt64Array:
        """The set of a candidate."""
        doc_ids, ends, hashes = self._shard(doc_id >> _ORDINAL_SHIFT)
        at = int(np.searchsorted(doc_ids, doc_id))
        if at == len(doc_ids) or doc_ids[at] != doc_id:
            raise DataError(
                f"document {doc_id} is a candidate but has no shingles: the files of stages/edges and stages/shingles "
                "are of different runs; remove stages/shingles and run again"
            )
        return hashes[ends[at] : ends[at + 1]]

    def _shard(self, ordinal: int) -> tuple[Int64Array, Int64Array, UInt64Array]:
        found = self._open.pop(ordinal, None)
        if found is None:
            folder = self._folders.get(ordinal)
            if folder is None:
                return np.empty(0, np.int64), np.zeros(1, np.int64), np.empty(0, np.uint64)
            found = _mapped(folder / DOC_IDS_FILE), _mapped(folder / ENDS_FILE), _mapped(folder / SHINGLES_FILE)
        self._open[ordinal] = found
        if len(self._open) > _MOST_OPEN_SHARDS:
            self._open.popitem(last=False)
        return found


def _mapped(path: Path) -> NDArray[Any]:
    return np.asarray(np.load(path, mmap_mode="r"))


def jaccard(a: UInt64Array, b: UInt64Array) -> float:
    """Size of the intersection over that of the union, of two sorted sets; 0 for two empty ones."""
    common = int(_n_common(a, b))
    return common / max(len(a) + len(b) - common, 1)


@compiled
def _n_common(a: UInt64Array, b: UInt64Array) -> int:
    i = j = n = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            n += 1
            i += 1
            j += 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return n
