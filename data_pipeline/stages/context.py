"""What the builders of tasks share: the job, its shards, the records of the stages before, and their names on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.config import DataJob
from data_pipeline.job_sources import PlannedShard
from data_pipeline.tasks import STAGES_FOLDER, Task, TaskRecord, hash_file

Records = dict[str, list[TaskRecord]]


@dataclass(frozen=True)
class JobContext:
    """A job as far as it has come."""

    job: DataJob
    shards: Sequence[PlannedShard]
    """In order; their ordinals are the upper halves of document ids."""
    records: Records = field(default_factory=dict)
    """Stage -> records in order of partitions, for every stage before the one that is being planned."""

    def settings(self, *sections: str) -> dict[str, Any]:
        """Sections of the configuration as JSON values."""
        values: dict[str, Any] = json.loads(self.job.model_dump_json(include=set(sections)))
        return values

    def by_partition(self, stage: str) -> dict[str, TaskRecord]:
        """The records of a stage by partition."""
        return {record.partition: record for record in self.records[stage]}

    def folders(self, stage: str) -> tuple[Path, ...]:
        """Where the outputs of a stage lie."""
        return tuple(self.job.out / record.target for record in self.records[stage])

    def hashes(self, stage: str, *files: str) -> dict[str, str]:
        """Hashes of the outputs of a stage, of these files only where some are named."""
        return hashes_of(self.records[stage], *files)


Builder = Callable[[JobContext], list[Task]]


def folder_of(stage: str, partition: str) -> Path:
    """Where the outputs of a task go, relative to the job's folder."""
    return Path(STAGES_FOLDER) / stage / partition


def hashes_of(records: Sequence[TaskRecord], *files: str) -> dict[str, str]:
    """Hashes of the outputs of records, of these files only where some are named."""
    return {
        name: value
        for record in records
        for name, value in record.hashes().items()
        if not files or name.rpartition("/")[2] in files
    }


def file_hashes(files: Sequence[Path]) -> dict[str, str]:
    """Content hashes of files that the user named; folders stand for the files in them."""
    found: dict[str, str] = {}
    for path in files:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file)] = hash_file(file)
    return found


def shard_path(record: TaskRecord) -> str:
    """The shard that a record of the filter stage is about."""
    return str(record.config["shard"]["path"])


def text_bytes(records: Sequence[TaskRecord]) -> int:
    """UTF-8 bytes of the texts that records of the filter stage kept."""
    return sum(int(record.counts.detail["text_bytes_kept"]) for record in records)


def detail_sum(records: Sequence[TaskRecord], key: str) -> int:
    """The sum of one number of the records' details."""
    return sum(int(record.counts.detail[key]) for record in records)


def without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """A dictionary without some of its keys."""
    return {key: value for key, value in values.items() if key not in keys}
