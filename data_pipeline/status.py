"""`megagpt data status DIR`: what a job has done and is doing, on one page, while it runs and afterwards."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from data_pipeline.executors.progress import StageProgress, read_progress
from data_pipeline.report import HTML_FILE, read_report
from data_pipeline.stages.order import STAGES
from data_pipeline.summary import REPORT_FILE, warnings_of
from data_pipeline.tasks import STAGES_FOLDER, TaskRecord, read_record
from megagpt.atomic import replace_file
from megagpt.errors import DataError

TASKS_FILE = "tasks.json"
"""<job>/stages/tasks.json: of each stage that the last run has reached, how many tasks it has."""
STALE_SECONDS = 10.0
"""A job that runs says so every second."""
_BAR_WIDTH = 24


@dataclass(frozen=True)
class StageTasks:
    """How many tasks a stage has in the last run, and how many of them were done before."""

    total: int
    reused: int


def note_tasks(out: Path, stages: dict[str, StageTasks]) -> None:
    """Leave for `status` what a run knows when it reaches a stage; an empty dictionary when it begins."""
    values = {stage: [tasks.total, tasks.reused] for stage, tasks in stages.items()}
    replace_file(out / STAGES_FOLDER / TASKS_FILE, json.dumps(values).encode())


def status(out: Path) -> str:
    """The state of a job, running, finished or stopped.

    Raises:
        DataError: there is no job in this folder.
    """
    stages_folder = out / STAGES_FOLDER
    if not stages_folder.is_dir():
        raise DataError(
            f"{out}: no data job here; `megagpt data run CONFIG` makes one in the folder `out` of its config"
        )
    progress = read_progress(out)
    known = _read_tasks(out)
    # Records of a stage that the last run has not reached may be those of another configuration.
    reached = known or STAGES
    records = {stage: _records_of(stages_folder / stage) if stage in reached else [] for stage in STAGES}
    last_reached = max((STAGES.index(stage) for stage in known), default=-1)
    lines = [str(out)]
    for number, stage in enumerate(STAGES):
        if known and stage not in known:
            lines.append(f"  {stage:<13} {'no tasks' if number < last_reached else 'to do'}")
            continue
        running = progress if progress is not None and progress.stage == stage and not progress.finished else None
        lines.append(_stage_line(stage, records[stage], known.get(stage), running))
        if running is not None:
            lines.append(_bar_line(running))
    lines.append("")
    if progress is not None:
        return "\n".join([*lines, *_rejections(records), _sign_of_life(progress), ""])
    if not (out / REPORT_FILE).is_file():
        return "\n".join([*lines, *_rejections(records), "not finished: run the same command again\n"])
    return "\n".join([*lines, *_results(out), f"finished; report: {out / HTML_FILE}\n"])


def _stage_line(
    stage: str, records: Sequence[TaskRecord], tasks: StageTasks | None, running: StageProgress | None
) -> str:
    n_done = len(records)
    of = ""
    if running is not None:
        reused = tasks.reused if tasks is not None else 0
        n_done, of = reused + running.tasks_done, f" of {reused + running.tasks_total}"
    elif tasks is not None:
        n_done, of = min(n_done, tasks.total), f" of {tasks.total}"
    counts = [record.counts for record in records]
    n_in, n_out = sum(c.documents_in for c in counts), sum(c.documents_out for c in counts)
    documents = f"{n_in:>12,} documents in {n_out:>12,} out" if n_in else ""
    return f"  {stage:<13} {n_done}{of} task(s) done {documents}".rstrip()


def _bar_line(running: StageProgress) -> str:
    """A bar, speeds, and the time that is left at this speed."""
    share = _share_done(running)
    filled = int(share * _BAR_WIDTH)
    bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
    seconds = max(running.updated - running.started, 1e-3)
    parts = [f"[{bar}] {share:>4.0%}"]
    if running.bytes_total:
        parts.append(f"{running.bytes_done / 1e6:,.1f} of {running.bytes_total / 1e6:,.1f} MB")
        parts.append(f"{running.bytes_done / 1e6 / seconds:,.2f} MB/s")
    if running.documents_done:
        parts.append(f"{running.documents_done / seconds:,.0f} documents/s")
    if share > 0:
        parts.append(f"{_duration(seconds / share - seconds)} left")
    if running.workers_lost:
        parts.append(f"{running.workers_lost} worker(s) lost, their tasks tried again")
    return "    " + "  ".join(parts)


def _share_done(running: StageProgress) -> float:
    if running.bytes_total:
        return running.bytes_done / running.bytes_total
    return running.tasks_done / max(running.tasks_total, 1)


def _sign_of_life(progress: StageProgress) -> str:
    """Whether the process that started the job still lives, as far as can be told from here."""
    age = max(0.0, time.time() - progress.updated)
    who = f"process {progress.pid} on {progress.host}"
    here = progress.host == socket.gethostname()
    if here and not _is_alive(progress):
        return f"no sign of life for {_duration(age)}: {who} is gone; run the same command again"
    if age < STALE_SECONDS or progress.finished:
        return f"running: {who}, last sign of life {_duration(age)} ago"
    advice = "it hangs, or its disk does" if here else "if it was killed, run the same command again"
    return f"no sign of life for {_duration(age)} from {who}; {advice}"


def _is_alive(progress: StageProgress) -> bool:
    """Whether the process is there, and is not a later one of the same number."""
    try:
        process = psutil.Process(progress.pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= progress.started + 1.0)
    except psutil.Error:
        return False


def _results(out: Path) -> list[str]:
    report = read_report(out)
    lines = [
        f"  {split:<13} {values['documents']:,} documents, {values['tokens']:,} tokens, "
        f"{values['text_bytes']:,} bytes of text"
        for split, values in report["splits"].items()
    ]
    return lines + [f"  warning: {warning}" for warning in warnings_of(report)]


def _rejections(records: dict[str, list[TaskRecord]]) -> list[str]:
    rejected: Counter[str] = Counter()
    for done in records.values():
        for record in done:
            rejected.update(record.counts.rejected)
    ordered = sorted(rejected.items(), key=lambda item: (-item[1], item[0]))
    return [f"  rejected    {number:>12,} {reason}" for reason, number in ordered if number]


def _records_of(folder: Path) -> list[TaskRecord]:
    found = (read_record(path) for path in sorted(folder.glob("*.json")))
    return [record for record in found if record is not None]


def _read_tasks(out: Path) -> dict[str, StageTasks]:
    try:
        values = json.loads((out / STAGES_FOLDER / TASKS_FILE).read_bytes())
        return {stage: StageTasks(*numbers) for stage, numbers in values.items()}
    except (OSError, ValueError, TypeError):
        return {}


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
