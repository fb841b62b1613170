"""The local executor: runs the tasks of one stage in worker processes and shows how far they are.

Workers only compute; the parent renames and records. So a worker that outlives a killed parent for a moment can leave
nothing behind that looks finished, and it ends itself as soon as it notices.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipeline.tasks import Finished, Task, execute
from megagpt.errors import DataError, MegaGPTError

_POLL_SECONDS = 0.1

Commit = Callable[[Task, Finished], None]


class _Tally:
    """Bytes and documents done, shared by the workers and the progress bar."""

    def __init__(self, context: Any) -> None:
        self.done = context.Array("q", 2)

    def reset(self) -> None:
        with self.done.get_lock():
            self.done[:] = [0, 0]

    def add(self, n_bytes: int, n_documents: int) -> None:
        with self.done.get_lock():
            self.done[0] += n_bytes
            self.done[1] += n_documents


class _WorkerState:
    """What the initializer of a worker process leaves for its tasks."""

    tally: _Tally | None = None


class LocalExecutor:
    """Worker processes of this machine, started when first needed and kept for all stages; a context manager."""

    def __init__(self, workers: int, console: Console | None = None) -> None:
        self._workers = workers
        self._console = console
        self._context = multiprocessing.get_context("spawn")
        self._tally = _Tally(self._context)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Sequence[Task], job_folder: Path, commit: Commit) -> None:
        """Run the tasks of one stage, any order; `commit` is called here, in this process, for each one done.

        One task, or one worker, runs in this process: the same functions, the same bytes.

        Raises:
            DataError: a task failed on its input, or its worker was killed; names the shard.
        """
        self._tally.reset()
        with _progress_bar(tasks, self._tally, self._console):
            if self._workers == 1 or len(tasks) == 1:
                for task in tasks:
                    commit(task, _run_here(task, job_folder, self._tally))
            else:
                self._run_in_pool(tasks, job_folder, commit)

    def _run_in_pool(self, tasks: Sequence[Task], job_folder: Path, commit: Commit) -> None:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._workers, self._context, initializer=_start_worker, initargs=(self._tally,)
            )
        running: dict[Future[Finished], Task] = {}
        waiting = iter(tasks)
        while True:
            # No more than the workers can start now: when one dies, the suspects are these and no others.
            while len(running) < self._workers and (task := next(waiting, None)) is not None:
                try:
                    running[self._pool.submit(_work, task, job_folder)] = task
                except BrokenProcessPool as error:  # a worker died between two looks at the futures
                    raise _killed(running.values()) from error
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                commit(running[future], _result(future, running))
                del running[future]


def _run_here(task: Task, job_folder: Path, tally: _Tally) -> Finished:
    try:
        return execute(task, job_folder, tally.add)
    except (MegaGPTError, OSError, pa.ArrowException) as error:
        raise _named(task, error) from error


def _result(future: Future[Finished], running: dict[Future[Finished], Task]) -> Finished:
    task = running[future]
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        raise _killed(running.values()) from error
    if isinstance(error, (MegaGPTError, OSError, pa.ArrowException)):
        raise _named(task, error) from error
    error.add_note(f"while running {task.name} ({task.subject})")
    raise error


def _killed(at_work: Iterable[Task]) -> DataError:
    suspects = ", ".join(sorted(f"{task.name} ({task.subject})" for task in at_work))
    return DataError(
        f"a worker process was killed (out of memory?) while these were at work: {suspects}; "
        "what was finished is kept: run the same command again, with fewer workers if memory was short"
    )


def _named(task: Task, error: Exception) -> DataError:
    return DataError(f"{task.name} ({task.subject}): {error}")


def _start_worker(tally: _Tally) -> None:
    _WorkerState.tally = tally
    # Each worker is one core's work: libraries that would start a thread per core are told so before they load.
    for variable in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A killed parent cannot stop its workers: they would wait for work forever."""
    connection.wait([sentinel])
    os._exit(1)


def _work(task: Task, job_folder: Path) -> Finished:
    tally = _WorkerState.tally
    return execute(task, job_folder, tally.add if tally is not None else None)


@contextmanager
def _progress_bar(tasks: Sequence[Task], tally: _Tally, console: Console | None) -> Iterator[None]:
    """A line with bytes, documents, elapsed and remaining time, on a terminal; elsewhere nothing."""
    if console is None:
        yield
        return
    total_bytes = sum(task.size_bytes for task in tasks)
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    stop = threading.Event()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(tasks[0].stage, total=total_bytes or None, amount="")
        thread = threading.Thread(target=_refresh, args=(bar, line, tally, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _refresh(bar: Progress, line: TaskID, tally: _Tally, stop: threading.Event) -> None:
    while not stop.wait(_POLL_SECONDS):
        n_bytes, n_documents = tally.done[:]
        bar.update(line, completed=n_bytes, amount=f"{n_bytes / 1e6:,.1f} MB  {n_documents:,} documents")
