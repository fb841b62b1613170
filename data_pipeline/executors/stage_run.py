"""The tasks of one stage on their way: which wait, which are done, and what happens to one whose worker was lost.

All executors share this: they differ only in where `attempt` is called and how its end is learned.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import traceback
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from data_pipeline.executors.progress import Heartbeat
from data_pipeline.extract.watchdog import ended_by_a_page, forget
from data_pipeline.tasks import Finished, Task, execute, new_attempt, scratch_folder
from megagpt.errors import DataError, MegaGPTError

MAX_LOSSES = 3
"""So often a task may lose its worker: two tries more after the first."""

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}

Commit = Callable[[Task, Finished], None]
Outcome = Finished | Exception
"""What became of an attempt whose worker lived to tell."""


class StageRun:
    """Bookkeeping of one stage, in the process that started the job."""

    def __init__(self, tasks: Sequence[Task], job_folder: Path, commit: Commit, *, keep_poison: bool = False) -> None:
        """Take over the tasks of a stage.

        Args:
            tasks: of one stage, at least one.
            job_folder: the job's folder.
            commit: called for each task that is done.
            keep_poison: go on with what earlier attempts noted; else a result could depend on an earlier run's code.
        """
        self.tasks = tasks
        self.job_folder = job_folder
        self.n_done = 0
        self.bytes_done = 0
        self.documents_done = 0
        self.n_lost = 0
        self._commit = commit
        self._waiting = deque(tasks)
        self._losses: Counter[str] = Counter()
        for task in tasks:
            if task.poison is not None and not keep_poison:
                forget(job_folder / task.poison)

    @property
    def over(self) -> bool:
        """Every task is done."""
        return self.n_done == len(self.tasks)

    def next(self) -> Task | None:
        """The task to start now; None where none waits."""
        if not self._waiting:
            return None
        task = self._waiting.popleft()
        if task.poison is not None:
            (self.job_folder / task.poison).parent.mkdir(parents=True, exist_ok=True)
        return task

    def settle(self, task: Task, outcome: Outcome) -> None:
        """An attempt came to its end: commit it, or raise its error.

        Raises:
            DataError: what the user can mend; names the task and its shard.
            Exception: anything else is a defect, and stays what it is.
        """
        if isinstance(outcome, Finished):
            self._commit(task, outcome)
            self.n_done += 1
            self.bytes_done += task.size_bytes
            self.documents_done += outcome.counts.documents_in
            return
        if isinstance(outcome, DataError) and str(outcome).startswith(named(task)):
            raise outcome
        if isinstance(outcome, MegaGPTError | OSError | pa.ArrowException):
            is_full = isinstance(outcome, OSError) and outcome.errno in _DISK_FULL
            fix = "; free some space and run the same command again: what was finished is kept" if is_full else ""
            raise DataError(f"{named(task)}: {outcome}{fix}") from outcome
        outcome.add_note(f"while running {named(task)}")
        raise outcome

    def lost(self, task: Task, how: str) -> None:
        """Its worker was killed, or its machine went away: the task waits again, in front of all others.

        It does not count where a page ended the worker: the next attempt passes over that one and gets further.

        Args:
            task: what was at work.
            how: the end of the worker, for the error: "was killed by SIGKILL (out of memory?)".

        Raises:
            DataError: that happened too often.
        """
        self.n_lost += 1
        shutil.rmtree(scratch_folder(task, self.job_folder), ignore_errors=True)
        if task.poison is None or not ended_by_a_page(self.job_folder / task.poison):
            self._losses[task.partition] += 1
        if self._losses[task.partition] >= MAX_LOSSES:
            raise DataError(
                f"{named(task)}: given up after {MAX_LOSSES} attempts; the last one's worker {how}. What was finished "
                "is kept: run the same command again, with more memory for each worker if memory was short"
            )
        self._waiting.appendleft(task)

    def put_back(self, task: Task) -> None:
        """It went down with a worker that was at work on another one: that is no attempt."""
        self._waiting.appendleft(task)


def named(task: Task) -> str:
    """Stage, partition and shard, as errors name them."""
    return f"{task.name} ({task.subject})"


def attempt(task: Task, job_folder: Path) -> Outcome:
    """Try a task, in whatever process this is; its heartbeat lies beside its outputs."""
    try:
        folder = new_attempt(task, job_folder)
        heartbeat = Heartbeat(folder)
        heartbeat.write()
        return execute(task, job_folder, heartbeat.add, folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that started the job judges it
        return error


def sendable(outcome: Outcome) -> Outcome:
    """The outcome in a form that survives the way to another process; a defect carries its traceback as a note."""
    if isinstance(outcome, Finished):
        return outcome
    if not isinstance(outcome, MegaGPTError):
        outcome.add_note("".join(traceback.format_exception(outcome)))
    try:
        pickle.loads(pickle.dumps(outcome))
    except Exception:  # noqa: BLE001 - any class of exception may refuse
        return RuntimeError("".join(traceback.format_exception_only(outcome)))
    return outcome


def limit_threads() -> None:
    """A worker is one core's work: libraries that would start a thread a core are told so before they load."""
    for variable in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
