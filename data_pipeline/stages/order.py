"""The stages in their order; `run_stages` is the whole chain of a job.

It does not know whether a task is run, reused or only looked at: `resolve` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data_pipeline.config import DataJob
from data_pipeline.job_sources import PlannedShard
from data_pipeline.stages import dedup, passages, text, tokens
from data_pipeline.stages.context import Builder, JobContext, Records
from data_pipeline.tasks import Counts, Task, TaskRecord, total
from megagpt.errors import DataError

BUILDERS: dict[str, Builder] = {
    "blocklist": text.blocklist_tasks,
    "benchmarks": text.benchmark_tasks,
    "extract": text.extract_tasks,
    "filter": text.filter_tasks,
    "signatures": dedup.signature_tasks,
    "published": dedup.published_tasks,
    "edges": dedup.edge_tasks,
    "shingles": dedup.shingle_tasks,
    "verify": dedup.verify_tasks,
    "clusters": dedup.cluster_tasks,
    "units": passages.unit_tasks,
    "unit_groups": passages.unit_group_tasks,
    "anchors": passages.anchor_tasks,
    "anchor_groups": passages.anchor_group_tasks,
    "windows": passages.window_tasks,
    "window_groups": passages.window_group_tasks,
    "documents": tokens.document_tasks,
    "contamination": tokens.contamination_tasks,
    "tokenizer": tokens.tokenizer_tasks,
    "encode": tokens.encode_tasks,
    "pack": tokens.pack_tasks,
    "manifest": tokens.manifest_tasks,
}
STAGES = tuple(BUILDERS)
LAST_STAGE = STAGES[-1]

Resolve = Callable[[list[Task]], list[TaskRecord]]


def run_stages(job: DataJob, shards: Sequence[PlannedShard], resolve: Resolve, until: str = LAST_STAGE) -> Records:
    """All stages of a job, each made from the records of those before it.

    Args:
        job: the configuration.
        shards: in order of priority.
        resolve: turns the tasks of one stage into their records, in the same order.
        until: the last stage to do.

    Returns:
        stage -> records, in order of partitions.

    Raises:
        DataError: a task fails, or no document passes the filters.
    """
    context = JobContext(job, shards)
    for stage, tasks_of in BUILDERS.items():
        context.records[stage] = resolve(tasks_of(context))
        if stage == "filter":
            _check_something_is_kept(context.records)
        if stage == "documents":
            _check_something_stays(context.records)
        if stage == until:
            break
    return context.records


def _check_something_is_kept(records: Records) -> None:
    counts = total(records["filter"])
    if counts.documents_out == 0:
        rejected = Counts(0, 0, {**total(records["extract"]).rejected, **counts.rejected}).rejected
        reasons = sorted(rejected.items(), key=lambda item: -item[1])
        why = ", ".join(f"{reason} {number:,}" for reason, number in reasons[:5]) or "the sources hold none"
        damage = [d for stage in ("extract", "filter") for r in records[stage] for d in r.counts.detail["damage"]]
        if damage:
            why += f"; damaged: {damage[0]['path']} at {damage[0]['unit']} {damage[0]['offset']}: {damage[0]['reason']}"
        raise DataError(
            f"of {max(total(records['extract']).documents_in, counts.documents_in):,} records no document is left "
            f"after extraction and filters ({why}); look at the sources and their text_key, at language.keep and at "
            "the thresholds of filters"
        )


def _check_something_stays(records: Records) -> None:
    counts = total(records["documents"])
    if counts.documents_out == 0:
        why = ", ".join(f"{reason} {number:,}" for reason, number in counts.rejected.items())
        raise DataError(
            f"of {counts.documents_in:,} documents that pass the filters none is left after deduplication and "
            f"decontamination ({why}); look at dedup.against and at decontamination"
        )
