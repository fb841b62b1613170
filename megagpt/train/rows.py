"""Files of rows that a run keeps beside its checkpoints, one JSON object a line: metrics.jsonl and events.jsonl.

A process may be killed while it writes a row, and a disk may give back what nobody wrote. A row that was cut at the
file's end is left out: it is younger than any checkpoint. Any other line that is no row is damage: it is counted and
told, and the file as it was found is kept beside the mended one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.atomic import flush_folder, write_file

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


@dataclass(frozen=True, slots=True)
class Damage:
    """What was wrong with a file of rows."""

    lines: int
    """That are no rows; they are no longer in the file."""
    kept_as: Path
    """The file as it was found."""

    def told(self, path: Path) -> str:
        """For a person."""
        return f"{path}: {self.lines} damaged lines were left out; the file as it was is {self.kept_as.name}"


@dataclass(frozen=True, slots=True)
class Rows:
    """What a file holds."""

    lines: list[tuple[bytes, dict[str, Any]]]
    """Each row as it was written, without the line's end, and what it says."""
    damaged: int = 0
    """Lines that are no rows."""


def read_rows(path: Path) -> Rows:
    """Every row of a file; an absent file has none."""
    content = path.read_bytes() if path.exists() else b""
    *lines, tail = content.split(b"\n")
    found = [(line, row) for line in (*lines, tail) if (row := _row(line)) is not None]
    damaged = sum(1 for line in lines if line.strip() and _row(line) is None)
    return Rows(found, damaged + (_row(tail) is None and not _is_begun(tail)))


def mend_rows(path: Path) -> tuple[Rows, Damage | None]:
    """The rows of a file, and what had to be left out; the file then holds them alone."""
    found, damage = read_rows(path), None
    if found.damaged:
        number = sum(1 for _ in path.parent.glob(f"{path.name}.damaged*"))
        damage = Damage(found.damaged, path.with_name(f"{path.name}.damaged{number or ''}"))
        write_file(damage.kept_as, path.read_bytes())
    if path.exists():
        write_rows(path, [line for line, _ in found.lines])
    return found, damage


def write_rows(path: Path, lines: list[bytes]) -> None:
    """Put a file of these rows in the place of what is there, whole or not at all."""
    write_file(path, b"".join(line + b"\n" for line in lines))


def make_durable(run_dir: Path) -> None:
    """Return when every row that was written so far survives a power cut.

    Raises:
        OSError: the disk fails.
    """
    for name in (METRICS, EVENTS):
        path = run_dir / name
        if path.exists():
            descriptor = os.open(path, os.O_RDONLY)  # a flush is of the file, by whomever it was written
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    flush_folder(run_dir)


def _row(line: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is no row."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    return row if is_row else None


def _is_begun(tail: bytes) -> bool:
    """Whether what follows the last whole line can be the begin of a row: all of it is written in ASCII."""
    return not tail or (tail.startswith(b"{") and tail.isascii() and b"\0" not in tail)
