"""`megagpt data run`: lock the job's folder, do what is not done, report.

<out>/stages/             records and outputs of every task but the last ones
<out>/tokenizer/          the tokenizer
<out>/NAME_*.bin/.idx     the token files, with manifest.json
<out>/report.json, report.md, report.html
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from data_pipeline.config import DataJob
from data_pipeline.executors.base import Executor, open_executor
from data_pipeline.filters.registry import files_of
from data_pipeline.job_sources import list_without_building, plan_shards
from data_pipeline.mixture import MIXTURE_FILE
from data_pipeline.plan_counts import count_documents, describe
from data_pipeline.report import HTML_FILE, MARKDOWN_FILE, read_report, write_report
from data_pipeline.stages.context import Records
from data_pipeline.stages.order import LAST_STAGE, STAGES, run_stages
from data_pipeline.stages.tokens import TOKENIZER_FOLDER
from data_pipeline.status import StageTasks, note_tasks
from data_pipeline.summary import REPORT_FILE, summarise, warnings_of
from data_pipeline.tasks import (
    SCRATCH_FOLDER,
    Finished,
    Task,
    TaskRecord,
    commit,
    read_record,
    why_not_reused,
)
from data_pipeline.tokenizer_training import check_tokenizer
from megagpt.atomic import write_file
from megagpt.config.load import dump_config
from megagpt.data.manifest import MANIFEST_NAME
from megagpt.errors import ConfigError, DataError
from megagpt.lock import locked_folder

JOB_FILE = "job.yaml"
PLAN_FILE = "plan.json"


@dataclass
class JobSummary:
    """What a run did."""

    out: Path
    report: dict[str, Any]
    """The content of report.json; empty where the run was to end before the last stage."""
    report_html: Path
    ran: dict[str, int]
    """Stage -> tasks that were run."""
    reused: dict[str, int]
    """Stage -> tasks that were done already."""
    wall_seconds: float
    warnings: list[str] = field(default_factory=list)

    @property
    def nothing_to_do(self) -> bool:
        """Everything was done before."""
        return not any(self.ran.values())


def run_job(
    job: DataJob, console: Console | None = None, until: str = LAST_STAGE, executor: Executor | None = None
) -> JobSummary:
    """Do the whole job, or what is left of it.

    Args:
        job: the configuration.
        console: shows progress and what is reused or done again, and why; None: silent.
        until: the last stage to do; before the job's last one, there is no report.
        executor: runs the tasks; None: the one that the configuration names.

    Raises:
        ConfigError: there is no such stage.
        DataError: another run works in the same folder, or it cannot be written; a source or shard cannot be read; a
            split would be empty ... What was finished stays: mend the cause and run the same command again.
    """
    started = time.perf_counter()
    _check_stage(until)
    _check_named_files(job)
    check_tokenizer(job.tokenizer, job.out / TOKENIZER_FOLDER)
    with _system_errors_named(job.out), locked_folder(job.out, _busy(job.out)):
        shutil.rmtree(job.out / SCRATCH_FOLDER, ignore_errors=True)
        write_file(job.out / JOB_FILE, dump_config(job).encode())
        if console is not None:
            console.print("sources        listing, building what is built here, hashing", highlight=False)
        shards = plan_shards(job)
        plan = {"shards": len(shards), "shard_bytes": sum(planned.shard.size_bytes for planned in shards)}
        write_file(job.out / PLAN_FILE, json.dumps(plan).encode())
        note_tasks(job.out, {})
        with executor or open_executor(job, console) as opened:
            resolver = _Resolver(job, opened, console)
            records = run_stages(job, shards, resolver, until)
        shutil.rmtree(job.out / SCRATCH_FOLDER, ignore_errors=True)
        if until != LAST_STAGE:
            return _stopped(resolver, until, started)
        return _conclude(job, records, resolver, started)


class _Resolver:
    """Reuses the tasks whose records stand for them, runs the others."""

    def __init__(self, job: DataJob, executor: Executor, console: Console | None) -> None:
        self.job = job
        self.executor = executor
        self.console = console
        self.ran: Counter[str] = Counter()
        self.reused: Counter[str] = Counter()
        self.reached: dict[str, StageTasks] = {}

    def __call__(self, tasks: list[Task]) -> list[TaskRecord]:
        done: dict[str, TaskRecord] = {}
        pending: list[Task] = []
        reasons: Counter[str] = Counter()
        for task in tasks:
            record = read_record(task.record_path(self.job.out))
            reason = why_not_reused(task, record, self.job.out)
            if reason is None and record is not None:
                done[task.partition] = record
            else:
                pending.append(task)
                reasons[reason or ""] += 1
        if tasks:
            self._announce(tasks[0].stage, len(done), reasons)
        if pending:
            started = time.perf_counter()
            self._run(pending, done)
            self._say_done(pending, done, time.perf_counter() - started)
        return [done[task.partition] for task in tasks]

    def _run(self, pending: list[Task], done: dict[str, TaskRecord]) -> None:
        def keep(task: Task, finished: Finished) -> None:
            done[task.partition] = commit(task, finished, self.job.out, _describing_files(task, self.job))

        self.executor.run(pending, self.job.out, keep)

    def _announce(self, stage: str, n_reused: int, reasons: Counter[str]) -> None:
        self.reused[stage] += n_reused
        self.ran[stage] += sum(reasons.values())
        self.reached[stage] = StageTasks(self.reused[stage] + self.ran[stage], self.reused[stage])
        note_tasks(self.job.out, self.reached)
        if self.console is None:
            return
        for reason, number in reasons.items():
            if reason != "not done yet":
                self.console.print(
                    f"{stage:<14} {number} task(s) again: {escape(reason)}", highlight=False, soft_wrap=True
                )

    def _say_done(self, pending: list[Task], done: dict[str, TaskRecord], seconds: float) -> None:
        if self.console is None:
            return
        counts = [done[task.partition].counts for task in pending]
        n_in, n_out = sum(c.documents_in for c in counts), sum(c.documents_out for c in counts)
        documents = f"{n_in:,} documents in, {n_out:,} out" if n_in else ""
        self.console.print(
            f"{pending[0].stage:<14} {len(pending)} task(s) in {seconds:.1f} s  {documents}", highlight=False
        )


def plan_job(job: DataJob, until: str = LAST_STAGE) -> str:
    """What a run would do, without doing it: shards, stages, what would be reused.

    Nothing is written, but that Python documentation which was built before is looked after as in a run.

    Args:
        job: the configuration.
        until: the last stage, as of `run_job`.

    Raises:
        ConfigError: there is no such stage.
        DataError: a source has no files.
    """
    _check_stage(until)
    _check_named_files(job)
    shards, unbuilt = list_without_building(job)
    lines = [f"{job.out}: {len(job.sources)} source(s), {job.workers} {job.executor} worker(s)", ""]
    if unbuilt and (job.out / "sources").is_dir():
        shards, unbuilt = plan_shards(job), []
    lines += [
        f"  {planned.shard.ordinal:06d}  {planned.shard.kind:<8} {planned.shard.size_bytes:>15,} bytes  "
        f"{planned.shard.source}: {planned.shard.path}"
        for planned in shards
    ]
    lines += [f"  (built first)  {source.kind}" for source in unbuilt]
    lines += [f"  {sum(planned.shard.size_bytes for planned in shards):,} bytes in {len(shards)} shard(s)", ""]
    lines += [*describe(count_documents(shards)), ""]
    peek = _Peek(job)
    if not unbuilt:
        with suppress(_StopPlanning):
            run_stages(job, shards, peek)
    last_seen = max((STAGES.index(stage) for stage in peek.seen), default=-1)
    for number, stage in enumerate(STAGES[: STAGES.index(until) + 1]):
        n_reused, n_tasks, reason = peek.seen.get(stage, (0, 0, ""))
        if n_tasks:
            known = f"{n_reused} of {n_tasks} task(s) reused" + (f"; {reason}" if reason else "")
        else:
            known = "no tasks" if number < last_seen else "will run; depends on the stages before it"
        lines.append(f"  {stage:<13} {known}")
    return "\n".join(lines) + "\n"


def _check_stage(name: str) -> None:
    if name not in STAGES:
        raise ConfigError(f"no stage is called {name!r}; the stages are, in this order: {', '.join(STAGES)}")


class _StopPlanning(Exception):  # noqa: N818 - not an error
    """A stage has to run: what follows depends on its result."""


class _Peek:
    """Looks at records only."""

    def __init__(self, job: DataJob) -> None:
        self.job = job
        self.seen: dict[str, tuple[int, int, str]] = {}

    def __call__(self, tasks: list[Task]) -> list[TaskRecord]:
        records = [read_record(task.record_path(self.job.out)) for task in tasks]
        reasons = [why_not_reused(t, r, self.job.out) for t, r in zip(tasks, records, strict=True)]
        pending = [reason for reason in reasons if reason is not None]
        if tasks:
            self.seen[tasks[0].stage] = (len(tasks) - len(pending), len(tasks), pending[0] if pending else "")
        if pending:
            raise _StopPlanning
        return [record for record in records if record is not None]


def _describing_files(task: Task, job: DataJob) -> list[Path]:
    """Files in the job's folder that describe what this task is about to replace."""
    reports = [job.out / name for name in (REPORT_FILE, HTML_FILE, MARKDOWN_FILE)]
    if task.stage in ("tokenizer", "pack"):
        return [*reports, job.out / MANIFEST_NAME, job.out / MIXTURE_FILE]
    return reports


def _conclude(job: DataJob, records: Records, resolver: _Resolver, started: float) -> JobSummary:
    """Write the reports, unless those of an earlier run are still true."""
    html = job.out / HTML_FILE
    report = None if any(resolver.ran.values()) or not html.is_file() else _intact_report(job.out)
    if report is None:
        wall_seconds = time.perf_counter() - started
        report = summarise(job, records, dict(resolver.ran), dict(resolver.reused), wall_seconds)
        write_file(job.out / REPORT_FILE, json.dumps(report, indent=1).encode() + b"\n")
        write_report(job.out)
    summary = JobSummary(
        out=job.out,
        report=report,
        report_html=html,
        ran=dict(resolver.ran),
        reused=dict(resolver.reused),
        wall_seconds=time.perf_counter() - started,
        warnings=warnings_of(report),
    )
    if resolver.console is not None:
        _print_summary(summary, resolver.console)
    return summary


def _stopped(resolver: _Resolver, stage: str, started: float) -> JobSummary:
    """What a run did that was to end before the last stage."""
    out = resolver.job.out
    if resolver.console is not None:
        resolver.console.print(
            f"stopped after {stage}, as asked; without --stage, the same command goes on", highlight=False
        )
    ran, reused = dict(resolver.ran), dict(resolver.reused)
    return JobSummary(out, {}, out / HTML_FILE, ran, reused, time.perf_counter() - started)


def _intact_report(out: Path) -> dict[str, Any] | None:
    """The report of an earlier run; None where it is missing or damaged and has to be written again."""
    try:
        return read_report(out)
    except DataError:
        return None


def _print_summary(summary: JobSummary, console: Console) -> None:
    if summary.nothing_to_do:
        n_tasks = sum(summary.reused.values())
        console.print(f"nothing to do: all {n_tasks} tasks were done and their outputs are intact", highlight=False)
    for split, values in summary.report["splits"].items():
        console.print(
            f"{split:<10} {values['documents']:,} documents, {values['tokens']:,} tokens, "
            f"{values['text_bytes']:,} bytes of text",
            highlight=False,
        )
    for warning in summary.warnings:
        console.print(f"warning: {escape(warning)}", highlight=False, soft_wrap=True)
    console.print(f"report: {escape(str(summary.report_html))}", highlight=False, soft_wrap=True)


def _check_named_files(job: DataJob) -> None:
    """Files that only a late stage reads are missed now and not after hours."""
    named = [("language.model", job.language.model), ("tokenizer.file", job.tokenizer.file)]
    named += [(f"filters.{name}", file) for name, values in job.filters.items() for file in files_of({name: values})]
    for key, file in named:
        if file is not None and not file.is_file():
            raise DataError(f"{key}: {file}: no such file")
    for folder in job.dedup.against:
        if not (folder / MANIFEST_NAME).is_file():
            raise DataError(f"dedup.against: {folder}: no {MANIFEST_NAME}; name the `out` folder of a finished job")


@contextmanager
def _system_errors_named(out: Path) -> Iterator[None]:
    """A full disk or a folder that may not be written is the user's to mend, and no defect."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{out}: the job cannot work in this folder: {error}; mend that and run the same command again, "
            "or set another `out`"
        ) from error


def _busy(out: Path) -> DataError:
    return DataError(f"{out}: another data job is writing here; wait for it, or set another `out`")
