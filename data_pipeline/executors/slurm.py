"""The Slurm executor: one job array a stage, submitted through submitit; an array element runs one task or several.

An element leaves the outcome of each task as a file beside the task's outputs, so what it finished counts even if it is
killed afterwards. Whether it still lives is asked of squeue, which every cluster has; accounting (sacct) may be off.

<job>/stages/slurm_logs/        batch scripts, and what each element wrote
<job>/stages/slurm_jobs.json    the jobs of a run that is under way; those of a killed one are cancelled by the next
"""

from __future__ import annotations

import json
import math
import pickle
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any, Literal, Self

from rich.console import Console

from data_pipeline.config import SlurmSection
from data_pipeline.executors.local import LocalExecutor
from data_pipeline.executors.progress import forget_progress, shown
from data_pipeline.executors.stage_run import Commit, Outcome, StageRun, attempt, limit_threads, sendable
from data_pipeline.tasks import SCRATCH_FOLDER, STAGES_FOLDER, Finished, Task, scratch_folder
from megagpt.atomic import replace_file, write_file
from megagpt.errors import DataError

LOGS_FOLDER = "slurm_logs"
JOBS_FILE = "slurm_jobs.json"
MAX_ELEMENTS = 1000
"""Slurm's own limit on an array (MaxArraySize) is 1001 unless the cluster sets another; more tasks share elements."""
_ASK_SECONDS = 10.0
"""Between two questions to squeue."""
_LOG_LINES = 5
_LAST_WORDS_SECONDS = 15
"""An element is told so long before its time is up: enough to write why it ends."""


@dataclass
class _Element:
    """An array element, as the process that submitted it sees it."""

    name: str
    job: Any
    open: dict[str, Task]
    """Partition -> task; those whose outcome is not known yet."""
    over_since: float | None = None


class SlurmExecutor:
    """Tasks as Slurm job arrays; a context manager that cancels what is left of them when it is interrupted."""

    def __init__(
        self,
        workers: int,
        settings: SlurmSection,
        console: Console | None = None,
        cluster: Literal["slurm", "local"] = "slurm",
    ) -> None:
        """Load submitit, but submit nothing yet.

        Args:
            workers: array elements at a time.
            settings: partition, time and memory of an element.
            console: shows how far a stage is; None: silent.
            cluster: local runs the same elements as processes of this machine, without Slurm.

        Raises:
            DataError: submitit is not installed.
        """
        self._submitit = _import_submitit()
        self._n_workers = workers
        self._settings = settings
        self._console = console
        self._cluster = cluster
        self._poll_seconds, self._grace_seconds = (2.0, 20.0) if cluster == "slurm" else (0.1, 0.0)
        self._queue = _Queue() if cluster == "slurm" else None
        self._job_folder: Path | None = None
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _exit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._job_folder is not None:
            (self._job_folder / STAGES_FOLDER / JOBS_FILE).unlink(missing_ok=True)
            forget_progress(self._job_folder)

    def run(self, tasks: Sequence[Task], job_folder: Path, commit: Commit) -> None:
        """Run the tasks of one stage, any order; `commit` is called in this process for each one done.

        Raises:
            DataError: a task failed on its input, was lost again and again, or nothing could be submitted.
        """
        if self._job_folder is None:
            self._job_folder = job_folder
            self._cancel_leftovers(job_folder)
        stage = StageRun(tasks, job_folder, commit)
        elements: list[_Element] = []
        with shown(stage, self._console):
            try:
                while not stage.over:
                    if waiting := list(iter(stage.next, None)):
                        elements += self._submit(waiting, job_folder)
                    self._look(elements, stage)
                    if not stage.over:
                        time.sleep(self._poll_seconds)
            finally:
                self._cancel(elements)

    def _submit(self, tasks: Sequence[Task], job_folder: Path) -> list[_Element]:
        size = math.ceil(len(tasks) / MAX_ELEMENTS)
        shares = [tasks[start : start + size] for start in range(0, len(tasks), size)]
        names = [uuid.uuid4().hex for _ in shares]
        try:
            executor = self._array(job_folder, tasks[0].stage)
            with executor.batch():
                jobs = [
                    executor.submit(run_element, tuple(share), job_folder, name)
                    for share, name in zip(shares, names, strict=True)
                ]
        except (RuntimeError, OSError) as error:
            raise DataError(f"executor: slurm, but Slurm takes no jobs: {str(error).strip()}") from error
        self._note_jobs(job_folder, jobs)
        if self._queue is not None:
            self._queue.forget()
        return [
            _Element(name, job, {task.partition: task for task in share})
            for name, job, share in zip(names, jobs, shares, strict=True)
        ]

    def _array(self, job_folder: Path, stage: str) -> Any:
        settings = self._settings
        executor = self._submitit.AutoExecutor(
            folder=(job_folder / STAGES_FOLDER / LOGS_FOLDER).absolute(), cluster=self._cluster
        )
        executor.update_parameters(
            name=f"megagpt-{stage}",
            timeout_min=settings.time_minutes,
            mem_gb=settings.memory_gb,
            cpus_per_task=settings.cpus_per_task,
            slurm_partition=settings.partition or None,
            slurm_array_parallelism=self._n_workers,
            slurm_signal_delay_s=_LAST_WORDS_SECONDS,
            slurm_additional_parameters=dict(settings.extra),
        )
        return executor

    def _look(self, elements: Sequence[_Element], stage: StageRun) -> None:
        """Take in what has come to an end since the last look."""
        # First who is gone, then what is there: nobody can end in between and be taken for lost.
        alive = self._queue.alive() if self._queue is not None else None
        gone = [element for element in elements if element.open and _is_over(element.job, alive)]
        outcomes = stage.job_folder / SCRATCH_FOLDER / stage.tasks[0].stage
        found = {path.parent.name + path.name: path for path in outcomes.glob("*/*.outcome")}
        for element in elements:
            for partition, task in list(element.open.items()):
                if path := found.get(f"{partition}{element.name}.outcome"):
                    outcome = pickle.loads(path.read_bytes())  # written by our own element
                    del element.open[partition]
                    stage.settle(task, outcome)
        for element in gone:
            if element.open:
                self._bury(element, stage)

    def _bury(self, element: _Element, stage: StageRun) -> None:
        """An element ended without an outcome for all its tasks."""
        element.over_since = element.over_since or time.monotonic()
        if time.monotonic() - element.over_since < self._grace_seconds:
            return  # a network file system shows what another machine wrote with a delay
        left = list(element.open.values())
        begun = [task for task in left if scratch_folder(task, stage.job_folder).exists()] or left[:1]
        element.open = {}
        for task in reversed(left):
            if task in begun:
                stage.lost(task, f"was lost with Slurm job {element.job.job_id}, {_last_words(element.job)}")
            else:
                stage.put_back(task)

    def _note_jobs(self, job_folder: Path, jobs: Sequence[Any]) -> None:
        if self._cluster == "slurm":
            path = job_folder / STAGES_FOLDER / JOBS_FILE
            known = set(json.loads(path.read_bytes())) if path.is_file() else set()
            write_file(path, json.dumps(sorted(known | _array_ids(jobs))).encode())

    def _cancel_leftovers(self, job_folder: Path) -> None:
        """Elements of a run that was killed before it could cancel them would compute for nobody."""
        path = job_folder / STAGES_FOLDER / JOBS_FILE
        if self._cluster == "slurm" and path.is_file():
            _scancel(set(json.loads(path.read_bytes())))
            path.unlink()

    def _cancel(self, elements: Sequence[_Element]) -> None:
        left = [element.job for element in elements if element.open]
        if self._cluster == "slurm":
            _scancel(_array_ids(left))
            return
        for job in left:
            job.cancel(check=False)
        for element in elements:  # they are this process's children, and linger a moment
            while not element.job.done():
                time.sleep(self._poll_seconds)


def run_element(tasks: Sequence[Task], job_folder: Path, name: str) -> None:
    """What an array element does, on its node: try each task, and leave its outcome as a file.

    Args:
        tasks: of one stage.
        job_folder: the job's folder, on a file system that all nodes share.
        name: of this element, unlike that of any other.
    """
    limit_threads()
    with LocalExecutor(1) as executor:
        for task in tasks:
            path = scratch_folder(task, job_folder) / f"{name}.outcome"
            if not path.exists():  # done before Slurm put this element back into the queue
                replace_file(path, pickle.dumps(_outcome(task, job_folder, executor)))


def _outcome(task: Task, job_folder: Path, executor: LocalExecutor) -> Outcome:
    interrupted = _import_submitit().core.utils.UncompletedJobError  # raised by a signal: time is up, or preempted
    if task.poison is None:
        outcome = attempt(task, job_folder)
        if isinstance(outcome, interrupted):
            raise outcome
        return sendable(outcome)
    kept: list[Finished] = []
    keep: Callable[[Task, Finished], None] = lambda _, finished: kept.append(finished)  # noqa: E731
    try:
        executor.work_through(StageRun([task], job_folder, keep, keep_poison=True))
    except interrupted:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that started the job judges it
        return sendable(error)
    return kept[0]


class _Queue:
    """The ids of this user's jobs that Slurm still knows as waiting or running."""

    def __init__(self) -> None:
        self._asked = -math.inf
        self._alive: frozenset[str] | None = None

    def forget(self) -> None:
        """Jobs were submitted since it was asked."""
        self._asked = -math.inf

    def alive(self) -> frozenset[str] | None:
        """None where that is not known: squeue fails now and then on a busy cluster."""
        if time.monotonic() - self._asked >= _ASK_SECONDS:
            command = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
            asked = subprocess.run(command, capture_output=True, text=True, check=False)
            self._alive = frozenset(asked.stdout.split()) if asked.returncode == 0 else None
            self._asked = time.monotonic()
        return self._alive


def _is_over(job: Any, alive: frozenset[str] | None) -> bool:
    if alive is not None:
        return job.job_id not in alive
    return bool(job.done())


def _array_ids(jobs: Sequence[Any]) -> set[str]:
    return {job.job_id.split("_")[0] for job in jobs}


def _scancel(ids: set[str]) -> None:
    if ids:
        subprocess.run(["scancel", *sorted(ids)], capture_output=True, check=False)


def _last_words(job: Any) -> str:
    """The end of what an element wrote to stderr, and where the rest lies."""
    path: Path = job.paths.stderr
    try:
        lines = path.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
    except OSError:
        return f"which left no log ({path})"
    return f"log {path}: " + (" | ".join(line.strip() for line in lines) or "(empty)")


def _exit(number: int, _: FrameType | None) -> None:
    """SIGTERM ends the run as Ctrl-C does, so that its jobs are cancelled."""
    sys.exit(128 + number)


def _import_submitit() -> ModuleType:
    try:
        import submitit
    except ImportError as error:
        raise DataError(
            f"executor: slurm, but submitit cannot be imported ({error}); install it with "
            "`pip install megagpt[slurm]`, or set executor: local"
        ) from error
    return submitit
