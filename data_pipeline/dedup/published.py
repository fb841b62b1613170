"""Documents that an earlier job published, brought into the deduplication of this one.

The signatures and band keys of its documents that were kept are copied shard by shard, under negative ids: the shards
of all published jobs are numbered -1, -2, ... in the order of `dedup.against`, and this number takes the place of the
shard's ordinal in the id. What follows treats them like shards of this job, and keeps them before any other copy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.clusters import CLUSTERS_FILE, is_removed, read_removed
from data_pipeline.dedup.minhash import MinHasher, parameters_of
from data_pipeline.dedup.row_files import RowsWriter
from data_pipeline.dedup.signatures import (
    BANDS_FILE,
    BANDS_ROW_GROUP,
    BANDS_SCHEMA,
    RUN_ROWS,
    SIGNATURES_FILE,
    SIGNATURES_SCHEMA,
)
from data_pipeline.parquet_reader import open_rows
from data_pipeline.tasks import STAGES_FOLDER, Counts, Progress, TaskRecord, read_record
from megagpt.errors import DataError

_ORDINAL_SHIFT = 32
_BATCH_ROWS = 1 << 17


@dataclass(frozen=True)
class PublishedShard:
    """One shard of a published job."""

    ordinal: int
    """Negative; its place among the shards of all published jobs."""
    signatures: Path
    """Folder with its signatures.parquet and bands.parquet."""
    clusters: Path
    """clusters.parquet of its job."""
    documents: Path
    """The texts that were signed, docs.parquet; only verification reads them."""
    hashes: dict[str, str]
    """Name of an input -> hash, of the signatures and the clusters."""

    @property
    def partition(self) -> str:
        """Name of the task that copies it."""
        return f"published-{-self.ordinal:06d}"


def published_shards(jobs: Sequence[Path], hasher: MinHasher | None) -> list[PublishedShard]:
    """The shards of published jobs, after a look at whether their signatures can be compared with this job's.

    Args:
        jobs: folders of finished jobs (`dedup.against`).
        hasher: this job's; None without near-duplicate removal.

    Raises:
        DataError: a folder is no finished job, or its MinHash parameters are others; the message names both.
    """
    shards: list[PublishedShard] = []
    for job in jobs:
        stages = job / STAGES_FOLDER
        clusters = read_record(stages / "clusters" / "all.json")
        records = [read_record(path) for path in sorted((stages / "signatures").glob("*.json"))]
        signed = [record for record in records if record is not None]
        finished = (job / "manifest.json").is_file() and len(signed) == len(records) > 0
        if clusters is None or CLUSTERS_FILE not in clusters.outputs or not finished:
            raise DataError(
                f"dedup.against names {job}, which is no finished job of this version: manifest.json, "
                f"{STAGES_FOLDER}/signatures or {STAGES_FOLDER}/clusters/all/{CLUSTERS_FILE} is missing. Name the "
                "folder (`out`) of a job that has run to its end, with its stages"
            )
        for record in signed:
            _check_parameters(job, record, hasher)
            hashes = {f"{job.name}/{name}": value for name, value in (record.hashes() | clusters.hashes()).items()}
            shards.append(
                PublishedShard(
                    ordinal=-1 - len(shards),
                    signatures=job / record.target,
                    clusters=clusters.path(job, CLUSTERS_FILE),
                    documents=stages / next(name for name in record.input_hashes if name.endswith("/docs.parquet")),
                    hashes=hashes,
                )
            )
    return shards


def _check_parameters(job: Path, record: TaskRecord, hasher: MinHasher | None) -> None:
    ours, theirs = parameters_of(hasher), dict(record.config.get("dedup", {}))
    if hasher is None:
        theirs["minhash"] = None
    if theirs != ours:
        raise DataError(
            f"dedup.against: {job} was made with the hashes {json.dumps(theirs, sort_keys=True)}, this job has "
            f"{json.dumps(ours, sort_keys=True)}; their signatures cannot be compared. Give both jobs the same "
            "dedup.ngram, dedup.bands and dedup.rows, and run that job again if its `definition` is an older one"
        )


def write_published(folder: Path, shard: PublishedShard, progress: Progress | None = None) -> Counts:
    """Copy the signatures and band keys of a published shard's kept documents, under negative ids.

    They are no documents of this job: the counts are 0, and their number is in the detail.

    Args:
        folder: where to.
        shard: which.
        progress: called with the bytes of both files.
    """
    with open_rows(shard.signatures / SIGNATURES_FILE) as file:
        ordinal = _ordinal(file)
    removed = read_removed(shard.clusters, ordinal << _ORDINAL_SHIFT, ((ordinal + 1) << _ORDINAL_SHIFT) - 1)
    shift = (shard.ordinal - ordinal) << _ORDINAL_SHIFT
    with RowsWriter(folder / SIGNATURES_FILE, SIGNATURES_SCHEMA) as writer:
        _copy(shard.signatures / SIGNATURES_FILE, writer, _BATCH_ROWS, removed, shift)
        n_documents = writer.n_rows
    with RowsWriter(folder / BANDS_FILE, BANDS_SCHEMA, BANDS_ROW_GROUP) as writer:
        # Leaving rows out keeps the order of a run; a row group over two runs only costs a little reading.
        _copy(shard.signatures / BANDS_FILE, writer, RUN_ROWS, removed, shift)
    if progress is not None:
        progress(sum((shard.signatures / name).stat().st_size for name in (SIGNATURES_FILE, BANDS_FILE)), 0)
    return Counts(0, 0, detail={"published": n_documents})


def _ordinal(file: pq.ParquetFile) -> int:
    if file.metadata.num_rows == 0:
        return 0
    return int(file.metadata.row_group(0).column(0).statistics.min) >> _ORDINAL_SHIFT


def _copy(path: Path, writer: RowsWriter, batch_rows: int, removed: np.typing.NDArray[np.int64], shift: int) -> None:
    with open_rows(path) as file:
        at = file.schema_arrow.get_field_index("doc_id")
        for batch in file.iter_batches(batch_rows):
            doc_ids = batch.column(at).to_numpy()
            stays = ~is_removed(doc_ids, removed)
            table = pa.Table.from_batches([batch]).filter(pa.array(stays))
            writer.write(table.set_column(at, "doc_id", pa.array(doc_ids[stays] + shift)))
