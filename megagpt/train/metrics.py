"""metrics.jsonl and its mirrors: TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megagpt.atomic import write_file
from megagpt.errors import MegaGPTError

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


class JsonlSink:
    """`metrics.jsonl`: one JSON object a line, each by one write.

    Rows of steps after `resume_step` belong to a run that was killed; they are cut off, and will come again.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self.cut_off = _keep_rows(path, resume_step)
        self._path = path
        self._file = path.open("ab", buffering=0)  # a row that could not be written is not tried again in close()

    def write(self, row: Row) -> None:
        """Append one row.

        Raises:
            MegaGPTError: it cannot be written, mostly because the disk is full.
        """
        line = (json.dumps(row) + "\n").encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise MegaGPTError(f"{self._path}: step {row['step']} cannot be written: {error.strerror}") from None
        if written != len(line):
            raise MegaGPTError(f"{self._path}: step {row['step']} cannot be written whole: the disk is full")

    def rewind(self, step: int) -> None:
        """Cut the rows after the step off."""
        self._file.close()
        _keep_rows(self._path, step)
        self._file = self._path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _keep_rows(path: Path, last_step: int) -> CutOff:
    if not path.exists():
        return CutOff()
    last_row_at = path.stat().st_mtime
    lines = [(line, row) for line in path.read_text("utf-8").splitlines() if (row := _row(line))]
    kept = [line for line, row in lines if row["step"] <= last_step]
    write_file(path, "".join(f"{line}\n" for line in kept).encode())
    again = [row for _, row in lines if row["step"] > last_step and "loss" in row]
    return CutOff(len(again), sum(float(row.get("step_seconds", 0.0)) for row in again), last_row_at)


def _row(line: str) -> dict[str, Any] | None:
    """The row, or None for a line that a kill cut in two."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


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
    """All sinks of one process; none on those that do not log."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def write(self, row: Row) -> None:
        """Give the row to every sink."""
        for sink in self._sinks:
            sink.write(row)

    def rewind(self, step: int) -> None:
        """Rows after this step will come again."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()
