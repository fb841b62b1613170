"""The shards of a job with the source that each comes from and the hash of its content."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import DataJob, Source
from data_pipeline.document import Shard
from data_pipeline.sources.shards import list_shards, prepare_sources
from data_pipeline.tasks import STAGES_FOLDER, hash_file, hash_json
from megagpt.atomic import write_file
from megagpt.errors import DataError

_HASHES_FILE = "shard_hashes.json"


@dataclass(frozen=True)
class PlannedShard:
    """A shard, where it belongs, and what identifies its content."""

    shard: Shard
    source: Source
    content_hash: str
    """xxh3_128 of a local file; for what is no local file, of its name and size."""


def plan_shards(job: DataJob) -> list[PlannedShard]:
    """List all shards in order of priority, build what has to be built, and hash the files.

    A file is read again only if its size or modification time is not the one it had when it was hashed.

    Raises:
        DataError: a source has no files, or a file cannot be read.
    """
    pairs: list[tuple[Shard, Source]] = []
    for source in job.sources:
        # One source at a time: a shard knows its source's name only, and names need not be unique.
        for shard in prepare_sources(job.model_copy(update={"sources": (source,)})):
            pairs.append((dataclasses.replace(shard, ordinal=len(pairs)), source))
    return _with_hashes(job, pairs)


def list_without_building(job: DataJob) -> tuple[list[PlannedShard], list[Source]]:
    """What can be listed without writing anything, and the sources that have to be built first.

    Raises:
        DataError: a source has no files, or a file cannot be read.
    """
    pairs: list[tuple[Shard, Source]] = []
    unbuilt = [source for source in job.sources if source.kind == "python_docs"]
    for source in job.sources:
        if source.kind != "python_docs":
            pairs += [(shard, source) for shard in list_shards(source, len(pairs))]
    return _with_hashes(job, pairs, remember=False), unbuilt


def _with_hashes(job: DataJob, pairs: Iterable[tuple[Shard, Source]], *, remember: bool = True) -> list[PlannedShard]:
    path = job.out / STAGES_FOLDER / _HASHES_FILE
    known = _read(path)
    now: dict[str, list[str]] = {}
    planned = []
    for shard, source in pairs:
        file = Path(shard.path)
        if shard.kind == "hub" or not file.is_file():
            content_hash = hash_json([shard.kind, shard.path, source.split, shard.size_bytes])
        else:
            try:
                stat = file.stat()
                state = f"{stat.st_size} {stat.st_mtime_ns}"
                seen = known.get(str(file.absolute()))
                content_hash = seen[1] if seen is not None and seen[0] == state else hash_file(file)
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror}") from error
            now[str(file.absolute())] = [state, content_hash]
        planned.append(PlannedShard(shard, source, content_hash))
    if remember and now != known:
        write_file(path, json.dumps(now, indent=1, sort_keys=True).encode())
    return planned


def _read(path: Path) -> dict[str, list[str]]:
    """A cache: where it is missing or damaged, files are hashed again."""
    try:
        values: dict[str, list[str]] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return values
