"""The Ray executor: each task is one Ray task that runs the same function on a shared file system.

Ray carries no data: arguments are paths and settings, results are counts and hashes. Retries are ours and not Ray's, so
that a worker which noted a deadly record before it died does not count, and every attempt has a folder of its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

from rich.console import Console

from data_pipeline.config import RaySection
from data_pipeline.executors.progress import forget_progress, shown
from data_pipeline.executors.stage_run import Commit, Outcome, StageRun, attempt, limit_threads, sendable
from data_pipeline.tasks import Task
from megagpt.errors import DataError

_GIB = 1 << 30
_OBJECT_STORE_BYTES = 100 << 20
"""Little more than the least that Ray accepts: nothing lies there."""
_CALLS_PER_WORKER = 16
"""Then a worker process is replaced, so that what its libraries hold on to does not add up."""
_LOOK_SECONDS = 1.0


class RayExecutor:
    """Tasks on a Ray cluster, or on a Ray of this machine that ends with the executor; a context manager.

    A Ray that the caller has initialised is used as it is, and left running.
    """

    def __init__(self, workers: int, settings: RaySection, console: Console | None = None) -> None:
        """Load Ray, but start and join nothing yet.

        Args:
            workers: tasks at a time.
            settings: which cluster, and what is reserved for a task.
            console: shows how far a stage is; None: silent.

        Raises:
            DataError: Ray is not installed.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's makers unless asked for
        self._ray = _import_ray()
        self._n_workers = workers
        self._settings = settings
        self._console = console
        self._is_ours = False
        self._job_folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_ours:
            self._ray.shutdown()
        if self._job_folder is not None:
            forget_progress(self._job_folder)

    def run(self, tasks: Sequence[Task], job_folder: Path, commit: Commit) -> None:
        """Run the tasks of one stage, any order; `commit` is called in this process for each one done.

        Raises:
            DataError: a task failed on its input, or its worker was lost again and again; names the shard. Or the
                cluster cannot be reached, or no node has the memory that a task is to have.
        """
        self._job_folder = job_folder = job_folder.absolute()
        self._start()
        stage = StageRun(tasks, job_folder, commit)
        with shown(stage, self._console):
            self._work_through(stage)

    def _work_through(self, stage: StageRun) -> None:
        needs = {"num_cpus": 1, "memory": self._task_bytes, "max_retries": 0, "max_calls": _CALLS_PER_WORKER}
        remote = self._ray.remote(**needs)(_run_task)
        running: dict[Any, Task] = {}
        try:
            while not stage.over:
                while len(running) < self._n_workers and (task := stage.next()) is not None:
                    running[remote.options(name=task.name).remote(task, stage.job_folder, Path.cwd())] = task
                for done in self._ray.wait(list(running), timeout=_LOOK_SECONDS)[0]:
                    self._take_result(done, running.pop(done), stage)
        finally:
            for left in running:
                with suppress(self._ray.exceptions.RayError):
                    self._ray.cancel(left, force=True)

    def _take_result(self, done: Any, task: Task, stage: StageRun) -> None:
        try:
            outcome: Outcome = self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:  # the task could not even be loaded there
            outcome = error.cause if isinstance(error.cause, Exception) else error
        except self._ray.exceptions.RayError as error:
            stage.lost(task, f"was lost ({_first_sentence(error)})")
            return
        stage.settle(task, outcome)

    @property
    def _task_bytes(self) -> int:
        return int(self._settings.memory_gb_per_task * _GIB)

    def _start(self) -> None:
        """With the first stage that has something to do: Ray takes seconds."""
        if not self._ray.is_initialized():
            self._is_ours = True
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
            if self._settings.address:
                self._join(quiet)
            else:
                self._ray.init(
                    num_cpus=self._n_workers,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _memory=self._n_workers * self._task_bytes,
                    **quiet,
                )
        self._check_memory()

    def _join(self, options: dict[str, Any]) -> None:
        address = self._settings.address
        try:
            self._ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise DataError(f"ray.address: no Ray cluster can be reached at {address!r}: {error}") from error

    def _check_memory(self) -> None:
        """Where no node has enough, Ray would wait for one forever, and say nothing."""
        largest = max((node["Resources"].get("memory", 0) for node in self._ray.nodes() if node["Alive"]), default=0)
        if largest < self._task_bytes:
            raise DataError(
                f"ray.memory_gb_per_task: {self._settings.memory_gb_per_task} GB for a task, but the largest node of "
                f"the Ray cluster offers {largest / _GIB:.1f} GB; set less, or start Ray with more --memory"
            )


def _run_task(task: Task, job_folder: Path, working_folder: Path) -> Outcome:
    limit_threads()
    try:
        os.chdir(working_folder)  # paths of a configuration may be relative, and Ray starts its workers anywhere
    except OSError as error:
        return error
    return sendable(attempt(task, job_folder))


def _import_ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise DataError(
            f"executor: ray, but Ray cannot be imported ({error}); install it with `pip install megagpt[ray]`, "
            "or set executor: local"
        ) from error
    return ray


def _first_sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().split('. ')[0].splitlines()[0]}"
