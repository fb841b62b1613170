"""The map stage as a task: runs `map_shard` and puts its counts into the form that every task reports in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq

from data_pipeline.config import DataJob, Source
from data_pipeline.document import Shard
from data_pipeline.map_shard import map_shard
from data_pipeline.tasks import Counts, Progress
from megagpt.errors import DataError

DOCUMENTS_FILE = "docs.parquet"
REJECTS_FILE = "rejects.parquet"


def map_documents(folder: Path, shard: Shard, source: Source, job: DataJob, progress: Progress | None = None) -> Counts:
    """Map one shard into `folder`.

    Raises:
        DataError: the shard cannot be read, or other documents lie in the file than were counted.
    """
    counts = map_shard(shard, source, job, folder, None if progress is None else lambda n: progress(n, 0))
    n_rows = pq.read_metadata(folder / DOCUMENTS_FILE).num_rows
    if n_rows != counts.kept:
        raise DataError(f"{shard.path}: {counts.kept} documents were kept but {n_rows} written")
    if progress is not None:
        progress(0, counts.records)
    values = json.loads(json.dumps(dataclasses.asdict(counts)))
    rejected = values.pop("rejected")
    return Counts(values.pop("records"), values.pop("kept"), rejected, values)
