"""metrics.jsonl and its mirrors: TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megagpt.errors import MegaGPTError
from megagpt.train.rows import Damage, mend_rows, write_rows

Row = Mapping[str, float | int | bool | None]


class Sink(Protocol):
    """Something that takes rows as they come."""

    def write(self, row: Row) -> None:
        """One row; it has a `step`."""

    def rewind(self, step: int) -> None:
        """The run goes back: rows after this step will come again."""

    def close(self) -> None:
        """Nothing more will come."""


def _step(row: Row) -> int:
    return int(row["step"] or 0)


@dataclass(frozen=True, slots=True)
class CutOff:
    """What a resumed run will do a second time."""

    steps: int = 0
    seconds: float = 0.0
    """That those steps took."""
    last_row_at: float | None = None
    """When the process before wrote its last row, seconds since 1970; None where there was none."""


Say = Callable[[str], object]
"""Shows a line to the user."""


class JsonlSink:
    """`metrics.jsonl`: one JSON object a line, each by one write.

    Rows of steps after `resume_step` belong to a run that was killed; they are cut off, and will come again. Lines that
    are no rows are left out, and the file as it was is kept beside it. A full disk ends no run: its rows wait in
    memory, some 300 bytes each, and are written when there is room.
    """

    def __init__(self, path: Path, resume_step: int, say: Say) -> None:
        self._path = path
        self._say = say
        self._waiting: list[bytes] = []
        self.damage: Damage | None = None
        """What was found in the file that is no row."""
        self.rows = 0
        """How many there are up to now, those that wait among them."""
        self.cut_off = self._keep_rows(resume_step)
        self._open()

    def _open(self) -> None:
        self._file = self._path.open("ab", buffering=0)  # a row that could not be written is not tried again in close()
        self._size = self._path.stat().st_size

    def write(self, row: Row) -> None:
        """Append one row, behind those that wait."""
        was_waiting = len(self._waiting)
        self._waiting.append((json.dumps(row) + "\n").encode())
        self.rows += 1
        problem = self._write_waiting()
        if problem is not None and not was_waiting:
            self._say(f"warning: {self._path}: step {row['step']} cannot be written: {problem}; rows wait in memory")
        elif problem is None and was_waiting:
            self._say(f"{self._path}: there is room again; {was_waiting} rows that waited are written")

    def _write_waiting(self) -> str | None:
        """Why they cannot be written; None where they are."""
        lines = b"".join(self._waiting)
        try:
            written = self._file.write(lines)
            if written != len(lines):
                self._file.truncate(self._size)  # a part of a row would make the next one unreadable
                return "the disk is full"
        except OSError as error:
            return error.strerror or str(error)
        self._size += len(lines)
        self._waiting.clear()
        return None

    def rewind(self, step: int) -> None:
        """Cut the rows after the step off."""
        self._file.close()
        self._waiting = [line for line in self._waiting if json.loads(line)["step"] <= step]
        self._keep_rows(step)
        self._open()

    def _keep_rows(self, last_step: int) -> CutOff:
        self.rows = len(self._waiting)
        if not self._path.exists():
            return CutOff()
        last_row_at = self._path.stat().st_mtime
        found, damage = mend_rows(self._path)
        if damage is not None:
            self.damage = damage
            self._say(f"warning: {damage.told(self._path)}")
        kept = [line for line, row in found.lines if row["step"] <= last_step]
        write_rows(self._path, kept)
        self.rows += len(kept)
        again = [row for _, row in found.lines if row["step"] > last_step and "loss" in row]
        return CutOff(len(again), sum(float(row.get("step_seconds", 0.0)) for row in again), last_row_at)

    def close(self) -> None:
        """Write what waits, and close the file.

        Raises:
            MegaGPTError: the rows that wait still cannot be written; they are lost.
        """
        problem = self._write_waiting() if self._waiting else None
        self._file.close()
        if problem is not None:
            first, last = (json.loads(line)["step"] for line in (self._waiting[0], self._waiting[-1]))
            raise MegaGPTError(
                f"{self._path}: {len(self._waiting)} rows of steps {first} to {last} are lost: {problem}; "
                "make room there before the run goes on"
            )


class TensorBoardSink:
    """TensorBoard events; a resumed run hides the rows that are about to come again."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(folder))
        self._writer = self._open(purge_step=resume_step + 1)

    def write(self, row: Row) -> None:
        """One scalar a value."""
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, _step(row))

    def rewind(self, step: int) -> None:
        """Hide the rows after the step."""
        self._writer.close()
        self._writer = self._open(purge_step=step + 1)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbSink:
    """Weights & Biases. Needs the `wandb` extra."""

    def __init__(self, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MegaGPTError(
                "log.wandb_project is set but wandb is not installed; pip install 'megagpt[wandb]', or leave it out"
            ) from None
        self._run = wandb.init(project=project, name=run_dir.name, id=run_dir.name, resume="allow", config=dict(config))

    def write(self, row: Row) -> None:
        """One log call."""
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=_step(row))

    def rewind(self, step: int) -> None:
        """Nothing: Weights & Biases keeps what it has, and takes no rows of steps before its last."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Metrics:
    """All sinks of one process; none on those that do not log.

    Args:
        sinks: the first one is the run's own record, the others are mirrors of it.
        say: is told of a mirror that fails; the run goes on without it.
    """

    def __init__(self, sinks: list[Sink], say: Say) -> None:
        self._sinks = sinks
        self._say = say

    @property
    def rows(self) -> int | None:
        """How many the run's own record has; None on a process that keeps none."""
        return next((sink.rows for sink in self._sinks if isinstance(sink, JsonlSink)), None)

    def write(self, row: Row) -> None:
        """Give the row to every sink."""
        self._each(lambda sink: sink.write(row))

    def rewind(self, step: int) -> None:
        """Rows after this step will come again."""
        self._each(lambda sink: sink.rewind(step))

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in reversed(tuple(self._sinks)):  # the record last: its own errors end the run
            try:
                call(sink)
            except OSError as error:
                if sink is self._sinks[0]:
                    raise
                self._sinks.remove(sink)
                self._say(f"warning: {type(sink).__name__} takes no more rows: {error}; metrics.jsonl has all")
