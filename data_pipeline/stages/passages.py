"""Which passages go: the stages from `units` to `window_groups`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_pipeline.code_fingerprint import code_fingerprint
from data_pipeline.dedup import clusters, first_occurrence, substrings, units
from data_pipeline.intake import DOCUMENTS_FILE
from data_pipeline.stages.context import (
    JobContext,
    detail_sum,
    folder_of,
    hashes_of,
    shard_path,
    text_bytes,
)
from data_pipeline.tasks import Counts, Task

_PACKAGES = ("duckdb", "numba", "numpy", "pyarrow")


def unit_tasks(context: JobContext) -> list[Task]:
    """Documents that stay -> their lines or paragraphs, one task a shard."""
    dedup = context.job.dedup
    if dedup.units == "none":
        return []
    config = {"dedup": {"units": dedup.units, "unit_min_words": dedup.unit_min_words}}
    return _shard_tasks(context, "units", units.write_units, (dedup.units, dedup.unit_min_words), config)


def unit_group_tasks(context: JobContext) -> list[Task]:
    """Lines or paragraphs -> those that occurred before, one task a range of keys."""
    return _group_tasks(context, "unit_groups", "units", first_occurrence.write_repeats)


def anchor_tasks(context: JobContext) -> list[Task]:
    """Documents that stay -> anchors of their windows of N tokens, one task a shard."""
    n_tokens = context.job.dedup.substring_tokens
    if not n_tokens:
        return []
    config = {"dedup": {"substring_tokens": n_tokens}}
    return _shard_tasks(context, "anchors", substrings.write_anchors, (n_tokens,), config)


def anchor_group_tasks(context: JobContext) -> list[Task]:
    """Anchors -> those that occur more than once, one task a range of keys."""
    return _group_tasks(context, "anchor_groups", "anchors", first_occurrence.write_repeated_anchors)


def window_tasks(context: JobContext) -> list[Task]:
    """Documents and repeated anchors -> the windows that may occur elsewhere, one task a shard."""
    n_tokens = context.job.dedup.substring_tokens
    if not n_tokens:
        return []
    config = {"dedup": {"substring_tokens": n_tokens}}
    arguments = (context.folders("anchor_groups"), n_tokens)
    return _shard_tasks(
        context, "windows", substrings.write_windows, arguments, config, context.hashes("anchor_groups")
    )


def window_group_tasks(context: JobContext) -> list[Task]:
    """Windows -> those that occurred before, one task a range of keys."""
    return _group_tasks(context, "window_groups", "windows", first_occurrence.write_repeats)


def _shard_tasks(
    context: JobContext,
    stage: str,
    work: Callable[..., Counts],
    arguments: tuple[Any, ...],
    config: dict[str, Any],
    inputs: dict[str, str] | None = None,
) -> list[Task]:
    members = context.records["clusters"][0]
    return [
        Task(
            stage=stage,
            partition=passed.partition,
            subject=shard_path(passed),
            work=work,
            arguments=(
                passed.path(context.job.out, DOCUMENTS_FILE),
                members.path(context.job.out, clusters.CLUSTERS_FILE),
                *arguments,
            ),
            config=config,
            code=code_fingerprint(work),
            inputs={**hashes_of([passed], DOCUMENTS_FILE), **hashes_of([members]), **(inputs or {})},
            target=folder_of(stage, passed.partition),
            size_bytes=text_bytes([passed]),
        )
        for passed in context.records["filter"]
    ]


def _group_tasks(context: JobContext, stage: str, before: str, work: Callable[..., Counts]) -> list[Task]:
    records = context.records[before]
    if not records:
        return []
    n_partitions = first_occurrence.n_partitions(detail_sum(records, "rows"))
    return [
        Task(
            stage=stage,
            partition=f"{number:04d}",
            subject=f"repeated passages, part {number + 1} of {n_partitions}",
            work=work,
            arguments=(context.folders(before), (number, n_partitions)),
            config={"partition": [number, n_partitions]},
            code=code_fingerprint(work),
            inputs=hashes_of(records),
            target=folder_of(stage, f"{number:04d}"),
            size_bytes=sum(output["bytes"] for record in records for output in record.outputs.values()) // n_partitions,
        )
        for number in range(n_partitions)
    ]
