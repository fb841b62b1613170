"""How far a stage is: every worker leaves a heartbeat, the process that started the job sums them up once a second.

<job>/scratch/STAGE/PARTITION/ATTEMPT/alive.json    what one attempt has done so far
<job>/stages/progress.json                          the stage, for `megagpt data status`; there while a job runs
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_pipeline.tasks import SCRATCH_FOLDER, STAGES_FOLDER, Task
from megagpt.atomic import replace_file

PROGRESS_FILE = "progress.json"
HEARTBEAT_FILE = "alive.json"
_BEAT_SECONDS = 1.0
_BAR_SECONDS = 0.25


class Heartbeat:
    """Written by a worker at most once a second: bytes and documents that its attempt has worked through."""

    def __init__(self, attempt_folder: Path) -> None:
        self._path = attempt_folder / HEARTBEAT_FILE
        self._bytes = 0
        self._documents = 0
        self._written = 0.0
        self._host = socket.gethostname()

    def add(self, n_bytes: int, n_documents: int) -> None:
        """Count what was done since the last call; a task's `progress`."""
        self._bytes += n_bytes
        self._documents += n_documents
        if time.monotonic() - self._written >= _BEAT_SECONDS:
            self.write()

    def write(self) -> None:
        """Leave a sign of life now."""
        self._written = time.monotonic()
        values = {"pid": os.getpid(), "host": self._host, "bytes": self._bytes, "documents": self._documents}
        replace_file(self._path, json.dumps(values).encode())


@dataclass(frozen=True)
class StageProgress:
    """The content of progress.json."""

    pid: int
    """Of the process that started the job, on `host`."""
    host: str
    stage: str
    tasks_done: int
    tasks_total: int
    """Tasks of this run; what was reused is not among them."""
    bytes_done: int
    bytes_total: int
    documents_done: int
    workers_lost: int
    """Workers that were killed; their tasks were tried again."""
    started: float
    """Unix seconds."""
    updated: float
    """Unix seconds."""
    finished: bool = False
    """The stage is through, and the next one has not begun to run."""


class _Stage(Protocol):
    """What of a StageRun is shown."""

    job_folder: Path
    n_done: int
    bytes_done: int
    documents_done: int
    n_lost: int

    @property
    def tasks(self) -> Any: ...


def read_progress(job_folder: Path) -> StageProgress | None:
    """The stage that runs, or that was running when the job was killed; None where none is."""
    try:
        return StageProgress(**json.loads((job_folder / STAGES_FOLDER / PROGRESS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def forget_progress(job_folder: Path) -> None:
    """The job has ended, one way or another."""
    (job_folder / STAGES_FOLDER / PROGRESS_FILE).unlink(missing_ok=True)


@contextmanager
def shown(stage: _Stage, console: Console | None) -> Iterator[None]:
    """Keep progress.json up to date, and a line on the terminal, while the body runs."""
    started = time.time()
    stop = threading.Event()
    on_terminal = console is not None and console.is_terminal
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not on_terminal) as bar:
        now = _look(stage, started)
        line = bar.add_task(now.stage, total=now.bytes_total or None, amount="")
        _write(stage.job_folder, now)
        period = _BAR_SECONDS if on_terminal else _BEAT_SECONDS
        thread = threading.Thread(target=_refresh, args=(stage, started, (bar, line), stop, period), daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            stop.set()
            thread.join()
            forget_progress(stage.job_folder)
            raise
        stop.set()
        thread.join()
        _write(stage.job_folder, dataclasses.replace(_look(stage, started), finished=True))


def _refresh(
    stage: _Stage, started: float, bar: tuple[Progress, TaskID], stop: threading.Event, period_seconds: float
) -> None:
    written = started
    while not stop.wait(period_seconds):
        now = _look(stage, started)
        amount = f"{now.bytes_done / 1e6:,.1f} MB  {now.documents_done:,} documents"
        bar[0].update(bar[1], completed=now.bytes_done, amount=amount)
        if now.updated - written >= _BEAT_SECONDS / 2:
            written = now.updated
            with suppress(OSError):  # a full disk is the tasks' to report
                _write(stage.job_folder, now)


def _look(stage: _Stage, started: float) -> StageProgress:
    tasks: list[Task] = list(stage.tasks)
    n_bytes, n_documents = _at_work(stage.job_folder, tasks[0].stage)
    total = sum(task.size_bytes for task in tasks)
    return StageProgress(
        pid=os.getpid(),
        host=socket.gethostname(),
        stage=tasks[0].stage,
        tasks_done=stage.n_done,
        tasks_total=len(tasks),
        bytes_done=min(stage.bytes_done + n_bytes, total),
        bytes_total=total,
        documents_done=stage.documents_done + n_documents,
        workers_lost=stage.n_lost,
        started=started,
        updated=time.time(),
    )


def _at_work(job_folder: Path, stage: str) -> tuple[int, int]:
    """Bytes and documents of the tasks that have begun and are not committed; of several attempts, the furthest."""
    furthest: dict[str, tuple[int, int]] = {}
    for path in (job_folder / SCRATCH_FOLDER / stage).glob(f"*/*/{HEARTBEAT_FILE}"):
        try:
            values = json.loads(path.read_bytes())
            done = (int(values["bytes"]), int(values["documents"]))
        except (OSError, ValueError, KeyError):  # just committed, or just begun
            continue
        partition = path.parent.parent.name
        furthest[partition] = max(furthest.get(partition, (0, 0)), done)
    return sum(n for n, _ in furthest.values()), sum(n for _, n in furthest.values())


def _write(job_folder: Path, progress: StageProgress) -> None:
    replace_file(job_folder / STAGES_FOLDER / PROGRESS_FILE, json.dumps(dataclasses.asdict(progress)).encode())
