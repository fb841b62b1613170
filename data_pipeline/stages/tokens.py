"""From the documents that stay to token files: the stages from `documents` to `manifest`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline import documents, encode, manifest, pack, tokenizer_training
from data_pipeline.code_fingerprint import code_fingerprint
from data_pipeline.config import DecontaminationSection
from data_pipeline.decontamination import contaminated
from data_pipeline.dedup import clusters, first_occurrence, signatures
from data_pipeline.intake import DOCUMENTS_FILE
from data_pipeline.stages.context import (
    JobContext,
    detail_sum,
    file_hashes,
    folder_of,
    hashes_of,
    shard_path,
    text_bytes,
)
from data_pipeline.tasks import Task

TOKENIZER_FOLDER = "tokenizer"


def document_tasks(context: JobContext) -> list[Task]:
    """Documents that stay, with repeated and contaminated passages cut, one task a shard."""
    job = context.job
    section = job.decontamination
    index = next(iter(context.folders("benchmarks")), None)
    decontaminator = None if index is None else (index, section.action, section.excise_characters)
    spans = {
        kind: tuple(folder / first_occurrence.REPEATS_FILE for folder in context.folders(stage))
        for kind, stage in (("units", "unit_groups"), ("substrings", "window_groups"))
    }
    members = context.records["clusters"][0]
    shared = {
        **hashes_of([members]),
        **context.hashes("unit_groups"),
        **context.hashes("window_groups"),
        **context.hashes("benchmarks"),
    }
    return [
        Task(
            stage="documents",
            partition=passed.partition,
            subject=shard_path(passed),
            work=documents.write_documents,
            arguments=(
                passed.path(job.out, DOCUMENTS_FILE),
                members.path(job.out, clusters.CLUSTERS_FILE),
                signed.path(job.out, signatures.SIGNATURES_FILE),
                spans,
                decontaminator,
            ),
            config={"decontamination": None if index is None else _cutting(section)},
            code=code_fingerprint(documents.write_documents),
            inputs={
                **hashes_of([passed], DOCUMENTS_FILE),
                **hashes_of([signed], signatures.SIGNATURES_FILE),
                **shared,
            },
            target=folder_of("documents", passed.partition),
            size_bytes=text_bytes([passed]),
        )
        for passed, signed in zip(context.records["filter"], context.records["signatures"], strict=True)
    ]


def _cutting(section: DecontaminationSection) -> dict[str, Any]:
    """What is done about a hit; what counts as one is in the index."""
    return section.model_dump(mode="json", include={"action", "excise_characters"})


def contamination_tasks(context: JobContext) -> list[Task]:
    """Hits of all shards -> the list of contaminated benchmark items."""
    index = next(iter(context.folders("benchmarks")), None)
    if index is None:
        return []
    hits = tuple(folder / documents.CONTAMINATION_FILE for folder in context.folders("documents"))
    return [
        Task(
            stage="contamination",
            partition="all",
            subject="benchmark items",
            work=contaminated.write_contamination,
            arguments=(hits, index),
            config={},
            code=code_fingerprint(contaminated.write_contamination),
            inputs={**context.hashes("documents", documents.CONTAMINATION_FILE), **context.hashes("benchmarks")},
            target=Path("contamination"),
        )
    ]


def tokenizer_tasks(context: JobContext) -> list[Task]:
    """The tokenizer: trained on the documents that stay, or taken as it is."""
    job = context.job
    settings = job.tokenizer
    config: dict[str, Any] = {"kind": settings.kind}
    inputs: dict[str, str] = {}
    match settings.kind:
        case "train_bpe":
            config = settings.model_dump(mode="json", exclude={"name", "file"})
            inputs = context.hashes("documents", DOCUMENTS_FILE)
        case "tiktoken":
            config |= {"name": settings.name}
        case "file":
            inputs = file_hashes([settings.file] if settings.file is not None else [])
    n_bytes = detail_sum(context.records["documents"], "text_bytes")
    return [
        Task(
            stage="tokenizer",
            partition="all",
            subject=settings.kind,
            work=tokenizer_training.write_tokenizer,
            arguments=(
                tuple(folder / DOCUMENTS_FILE for folder in context.folders("documents")),
                n_bytes,
                settings,
            ),
            config={"tokenizer": config},
            code=code_fingerprint(tokenizer_training.write_tokenizer),
            inputs=inputs,
            target=Path(TOKENIZER_FOLDER),
            size_bytes=n_bytes,
        )
    ]


def encode_tasks(context: JobContext) -> list[Task]:
    """Documents -> tokens, one task a shard."""
    job = context.job
    shared = context.hashes("tokenizer")
    return [
        Task(
            stage="encode",
            partition=record.partition,
            subject=record.partition,
            work=encode.write_tokens,
            arguments=(job.out / record.target, str(job.out / TOKENIZER_FOLDER)),
            config={},
            code=code_fingerprint(encode.write_tokens),
            inputs={**hashes_of([record], DOCUMENTS_FILE, documents.HASHES_FILE), **shared},
            target=folder_of("encode", record.partition),
            size_bytes=int(record.counts.detail["text_bytes"]),
        )
        for record in context.records["documents"]
    ]


def pack_tasks(context: JobContext) -> list[Task]:
    """All tokens, globally shuffled and split."""
    job = context.job
    vocab_size = context.records["tokenizer"][0].counts.detail["vocab_size"]
    return [
        Task(
            stage="pack",
            partition="all",
            subject=job.pack.name,
            work=pack.write_packed,
            arguments=(context.folders("encode"), vocab_size, job.pack),
            config=context.settings("pack"),
            code=code_fingerprint(pack.write_packed),
            inputs=context.hashes("encode"),
            target=Path(),
            size_bytes=detail_sum(context.records["encode"], "text_bytes"),
        )
    ]


def manifest_tasks(context: JobContext) -> list[Task]:
    """What was made -> manifest.json and mixture.yaml."""
    job = context.job
    packed = context.records["pack"][0]
    # Where the result lies and who computed it are no part of what it is.
    settings = job.model_dump(mode="json", exclude={"out", "workers", "executor", "ray", "slurm"})
    return [
        Task(
            stage="manifest",
            partition="all",
            subject=job.pack.name,
            work=manifest.write_manifest_of,
            arguments=(packed.counts.detail, packed.outputs, str(job.out / TOKENIZER_FOLDER), settings),
            config=settings,
            code=code_fingerprint(manifest.write_manifest_of),
            inputs={**hashes_of([packed]), **context.hashes("tokenizer")},
            target=Path(),
            size_bytes=sum(output["bytes"] for output in packed.outputs.values()),
        )
    ]
