"""What an executor is, and which one a job asks for.

Workers only compute, into a folder that is theirs alone; the process that started the job renames and records. So it
does not matter how often a task is tried, or whether a worker that was given up is still writing somewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console

from data_pipeline.config import DataJob
from data_pipeline.executors.stage_run import Commit
from data_pipeline.tasks import Task


class Executor(Protocol):
    """Runs the tasks of one stage after another; a context manager, which leaves no process behind."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, tasks: Sequence[Task], job_folder: Path, commit: Commit) -> None:
        """Run the tasks of one stage, in any order; `commit` is called once for each, in this process.

        Raises:
            DataError: a task failed on its input, or its worker was lost too often; names stage, partition and shard.
        """


def open_executor(job: DataJob, console: Console | None = None) -> Executor:
    """The executor that `job.executor` names; nothing is started before it is entered.

    Raises:
        DataError: the package that it needs is not installed.
    """
    match job.executor:
        case "local":
            from data_pipeline.executors.local import LocalExecutor

            return LocalExecutor(job.workers, console)
        case "ray":
            from data_pipeline.executors.ray import RayExecutor

            return RayExecutor(job.workers, job.ray, console)
        case "slurm":
            from data_pipeline.executors.slurm import SlurmExecutor

            return SlurmExecutor(job.workers, job.slurm, console)
