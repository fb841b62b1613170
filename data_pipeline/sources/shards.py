"""From a job's list of sources to shards, and from a shard to its records."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_pipeline.config import DataJob, Source
from data_pipeline.document import Shard
from data_pipeline.sources.common_crawl import crawl_addresses
from data_pipeline.sources.files import find_files, is_remote, read_paths_file
from data_pipeline.sources.hub import read_hub
from data_pipeline.sources.jsonl import read_jsonl
from data_pipeline.sources.parquet import read_parquet
from data_pipeline.sources.python_docs import build_python_docs
from data_pipeline.sources.record import Records
from data_pipeline.sources.txt import read_txt
from data_pipeline.sources.warc import read_warc, read_wet
from megagpt.errors import DataError

_NO_WILDCARDS = str.maketrans("", "", "*?[]")
KIND_OF_ENDING = {
    ".warc.gz": "warc",
    ".warc.zst": "warc",
    ".warc": "warc",
    ".wet.gz": "wet",
    ".wet.zst": "wet",
    ".wet": "wet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".jsonl.zst": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
}


def prepare_sources(job: DataJob) -> list[Shard]:
    """The shards of all sources of a job, in its order; the Python documentation is built under `out/sources` first.

    Raises:
        DataError: a source has no files, or files of an unknown format.
    """
    shards: list[Shard] = []
    for source in job.sources:
        if source.kind == "python_docs":
            built = build_python_docs(job.out / "sources" / _docs_folder(source), source.packages)
            name = source_name(source)
            for kind, path in (*(("warc", path) for path in built.pages), ("jsonl", built.texts)):
                shards.append(Shard(len(shards), name, kind, str(path), path.stat().st_size))
        else:
            shards += list_shards(source, len(shards))
    return shards


def list_shards(source: Source, ordinal_start: int) -> list[Shard]:
    """One shard a file, sorted by name, or in the order of a list of paths; a hub data set is one shard.

    Raises:
        DataError: nothing matches the path, a list of paths is wrong, or a file's format cannot be told from its name.
    """
    if source.kind == "python_docs":
        raise DataError("a source of kind python_docs has no files before prepare_sources has built them")
    if source.kind == "hub":
        return [Shard(ordinal_start, source_name(source), "hub", source.path, 0)]
    return [
        Shard(ordinal, source_name(source), _kind(path, source), path, size)
        for ordinal, (path, size) in enumerate(_list_files(source), ordinal_start)
    ]


def _list_files(source: Source) -> list[tuple[str, int]]:
    """Paths or addresses with their sizes in bytes; 0 where asking would take a request a file."""
    name = source.name or repr(source.kind)
    if source.kind == "common_crawl":
        return [_with_size(path) for path in crawl_addresses(source)]
    if source.paths_file is not None:
        if source.path:
            raise DataError(f"source {name}: both path and paths_file are set; leave one of them out")
        return [_with_size(path) for path in read_paths_file(source.paths_file)]
    if not source.path:
        raise DataError(f"source {name}: path is empty; name a file, a folder or a glob, or a paths_file")
    files = find_files(source.path)
    if not files:
        raise DataError(f"{source.path}: no file matches; a source is a file, a folder with files, or a glob")
    return files


def _with_size(path: str) -> tuple[str, int]:
    if is_remote(path):
        return path, 0
    try:
        return path, Path(path).stat().st_size
    except OSError as error:
        raise DataError(f"{path}: named in a list of paths, but cannot be opened: {error.strerror}") from None


def read_shard(shard: Shard, source: Source) -> Records:
    """The records of a shard from beginning to end, with what could not be read in between.

    Raises:
        DataError: the file or data set cannot be opened, or lacks the text column.
    """
    match shard.kind:
        case "warc":
            return read_warc(shard)
        case "wet":
            return read_wet(shard)
        case "jsonl":
            return read_jsonl(shard, source.text_key)
        case "parquet":
            return read_parquet(shard, source.text_key)
        case "txt":
            return read_txt(shard)
        case "hub":
            return read_hub(shard, source)
        case _:
            known = ", ".join(sorted(set(KIND_OF_ENDING.values())))
            raise DataError(f"{shard.path}: no reader for kind {shard.kind!r}; known are {known}, hub")


def _docs_folder(source: Source) -> str:
    """A folder for each choice of packages, so that two sources do not build over each other."""
    if not source.packages:
        return "python_docs"
    return "python_docs-" + hashlib.sha256(" ".join(source.packages).encode()).hexdigest()[:12]


def source_name(source: Source) -> str:
    """What a source is called in reports: its name, else the last telling part of its path, else its kind."""
    if source.name:
        return source.name
    if source.crawl:
        return source.crawl
    path = Path(source.path or source.paths_file or "")
    stems = (part.split(".")[0].translate(_NO_WILDCARDS).strip("-_/") for part in reversed(path.parts))
    return next((stem for stem in stems if stem), source.kind)


def _kind(path: str, source: Source) -> str:
    if source.kind not in ("auto", "common_crawl"):
        return source.kind
    # Common Crawl names its text archives NAME.warc.wet.gz: the last ending decides.
    for ending in sorted(KIND_OF_ENDING, key=len, reverse=True):
        if path.lower().endswith(ending):
            return KIND_OF_ENDING[ending]
    raise DataError(
        f"{path}: the format cannot be told from the name; known endings are {', '.join(KIND_OF_ENDING)}. "
        "Set the source's kind"
    )
