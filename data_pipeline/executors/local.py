"""The local executor: worker processes of this machine, each with a pipe of its own.

A worker that is killed takes down its own task and nothing else, and it is known which one that was. One that outlives
a killed parent for a moment can leave nothing behind that looks finished, and it ends itself as soon as it notices.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from rich.console import Console

from data_pipeline.executors.progress import forget_progress, shown
from data_pipeline.executors.stage_run import Commit, Outcome, StageRun, attempt, limit_threads, sendable
from data_pipeline.tasks import Task

RECYCLE_BYTES = 1 << 30
"""A worker that holds more memory of its own than this after a task is replaced."""

_END_SECONDS = 5.0

Pipe = connection.Connection


class LocalExecutor:
    """Worker processes, started when first needed and kept for all stages; a context manager.

    With one worker, tasks run in this process, but for those that may kill theirs: the same functions, the same bytes.
    """

    def __init__(self, workers: int, console: Console | None = None, recycle_bytes: int = RECYCLE_BYTES) -> None:
        """Start nothing yet.

        Args:
            workers: tasks at a time.
            console: shows how far a stage is; None: silent.
            recycle_bytes: see RECYCLE_BYTES.
        """
        self._n_workers = workers
        self._console = console
        self._recycle_bytes = recycle_bytes
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._job_folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []
        if self._job_folder is not None:
            forget_progress(self._job_folder)

    def run(self, tasks: Sequence[Task], job_folder: Path, commit: Commit) -> None:
        """Run the tasks of one stage, any order; `commit` is called here, in this process, for each one done.

        Raises:
            DataError: a task failed on its input, or its worker was killed again and again; names the shard.
        """
        self._job_folder = job_folder
        stage = StageRun(tasks, job_folder, commit)
        with shown(stage, self._console):
            self.work_through(stage)

    def work_through(self, stage: StageRun) -> None:
        """Run a stage to its end, or to its first error.

        Raises:
            DataError: as `run`.
        """
        at_work: dict[Pipe, _Worker] = {}
        while not stage.over:
            while len(at_work) < self._n_workers and (task := stage.next()) is not None:
                if self._n_workers == 1 and task.poison is None:
                    stage.settle(task, attempt(task, stage.job_folder))
                else:
                    worker = self._idle_worker(at_work)
                    worker.start(task, stage.job_folder)
                    at_work[worker.pipe] = worker
            for pipe in connection.wait(list(at_work)) if at_work else ():
                worker = at_work.pop(pipe)  # type: ignore[call-overload]
                self._take_result(worker, stage)

    def _idle_worker(self, at_work: dict[Pipe, _Worker]) -> _Worker:
        for worker in self._workers:
            if worker.pipe not in at_work:
                return worker
        self._workers.append(_Worker(self._context))
        return self._workers[-1]

    def _take_result(self, worker: _Worker, stage: StageRun) -> None:
        task = worker.task
        try:
            outcome, held_bytes = worker.receive()
        except (EOFError, OSError):
            self._workers.remove(worker)
            stage.lost(task, worker.how_it_ended())
            return
        if held_bytes > self._recycle_bytes:
            self._workers.remove(worker)
            worker.end()
        stage.settle(task, outcome)


class _Worker:
    """One worker process as its parent sees it."""

    def __init__(self, context: SpawnContext) -> None:
        self.pipe, theirs = context.Pipe()
        self._task: Task | None = None
        self._process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # else the death of the worker would not close the pipe

    @property
    def task(self) -> Task:
        """What it is at work on."""
        if self._task is None:
            raise RuntimeError("an idle worker has no task")
        return self._task

    def start(self, task: Task, job_folder: Path) -> None:
        """Let it work on a task."""
        self._task = task
        with suppress(BrokenPipeError):  # killed while idle: the pipe's end says so when it is read
            self.pipe.send((task, job_folder))

    def receive(self) -> tuple[Outcome, int]:
        """The end of its attempt, and how many bytes of memory it holds now.

        Raises:
            EOFError, OSError: it was killed.
        """
        outcome, held_bytes = self.pipe.recv()
        self._task = None
        return outcome, held_bytes

    def how_it_ended(self) -> str:
        """What became of a killed worker, as a predicate."""
        self._process.join(_END_SECONDS)
        code = self._process.exitcode
        self.end()
        if code is None or code >= 0:
            return f"ended with exit code {code}"
        cause = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{cause}"

    def end(self) -> None:
        """Stop it: kindly where it is idle, at once where it is at work (what it has written nobody looks at)."""
        self.pipe.close()
        if self._task is not None:
            self._process.kill()
        self._process.join(_END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _serve(pipe: Pipe) -> None:
    """A worker's life: tasks from the pipe, one after the other, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    limit_threads()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = pipe.recv_bytes()
            pipe.send((sendable(_try(message)), _held_bytes()))


def _try(message: bytes) -> Outcome:
    try:
        task, job_folder = pickle.loads(message)  # written by this process's own parent
    except Exception as error:  # noqa: BLE001 - a module that cannot be imported here, and the like
        return error
    return attempt(task, job_folder)


def _end_with(sentinel: int) -> None:
    """A killed parent cannot stop a worker that is at work."""
    connection.wait([sentinel])
    os._exit(1)


def _held_bytes() -> int:
    """Memory that is this process's own; pages of mapped files are the system's to take back."""
    memory = psutil.Process().memory_info()
    return int(memory.rss) - int(getattr(memory, "shared", 0))
