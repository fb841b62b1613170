"""A run's history, events.jsonl: what happened to it, one line each, and how its time was spent.

Every row has `time` (UTC), `event` and `step`:

    started, resumed    world_size, changed (key -> [before, now]), start_seconds (from the process's start to here),
                        and, where a process was there before: down_seconds, repeated_steps, repeated_seconds
    saved               seconds that training waited, written_in_seconds until it was durable
    save_failed         cause, in_a_row
    not_removed         cause: checkpoints that should be gone, or what other saves left, are still there
    made_room           removed: steps whose checkpoints made way for this one on a full disk
    rows_damaged        file, lines that are no rows and were left out, kept_as: the file as it was found
    rows_missing        file, expected by the checkpoint, found
    set_aside           cause: a damaged checkpoint, by `checkpoint.fall_back`, or what was none under a step's name
    spike               of the loss or gradient norm, and what was done
    rollback            to_step, skipped_batches
    skipped_batches     batches (first, end) that `train.skip_batches` passes over
    nonfinite           action (skip or stop), which ranks and samples; loss_scale, where it is all that is wrong
    diverged            reason
    hung, slow_rank     which rank, in which phase
    failed              exit_code and cause, by `megagpt train --restarts`
    stopped             cause: asked to, or the launcher had ended (see `train.stop`)
    finished
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from megagpt.train.metrics import CutOff, JsonlSink, Say
from megagpt.train.rows import EVENTS, METRICS, mend_rows
from megagpt.train.state import TrainState
from megagpt.train.stop import ASKED


def log_event(run_dir: Path, event: str, step: int, **details: Any) -> None:
    """Append a line to the run's history; a disk that is too full for it ends no run."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    row = {"time": now, "event": event, "step": step, **details}
    path = run_dir / EVENTS
    try:
        run_dir.mkdir(parents=True, exist_ok=True)  # a run may fail before any of its ranks came to make it
        with path.open("ab+", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            is_cut = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a kill, or by a full disk
            line = b"\n" * is_cut + json.dumps(row).encode() + b"\n"
            if file.write(line) != len(line):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        with suppress(OSError):  # the terminal's log may lie on the same disk
            sys.stderr.write(f"warning: {path}: not written: {error.strerror}: {json.dumps(row)}\n")


def count_ends(run_dir: Path) -> int:
    """How often the run has said that it is over, or that it stopped because it was asked to."""
    path = run_dir / EVENTS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return sum('"event": "finished"' in line or ('"event": "stopped"' in line and ASKED in line) for line in lines)


def log_start(run_dir: Path, step: int, cut_off: CutOff, **details: Any) -> None:
    """Say that training begins, or goes on after a process that has ended.

    Args:
        run_dir: of the run.
        step: that it stands at.
        cut_off: what the process before had done since then.
        details: what else to say.
    """
    began_at = psutil.Process().create_time()
    details["start_seconds"] = round(time.time() - began_at, 3)
    if cut_off.last_row_at is not None:
        details["down_seconds"] = round(max(0.0, began_at - cut_off.last_row_at), 3)
        details["repeated_steps"] = cut_off.steps
        details["repeated_seconds"] = round(cut_off.seconds, 3)
    log_event(run_dir, "resumed" if step else "started", step, **details)


def tell_damage(run_dir: Path, state: TrainState, metrics: JsonlSink, say: Say) -> None:
    """Say which rows a run that goes on has lost; events.jsonl is mended first.

    Args:
        run_dir: of the run.
        state: that it goes on from.
        metrics: opened at that state.
        say: shows a line to the user.
    """
    damage = mend_rows(run_dir / EVENTS)[1]
    if damage is not None:
        say(f"warning: {damage.told(run_dir / EVENTS)}")
    for name, found in ((METRICS, metrics.damage), (EVENTS, damage)):
        if found is not None:
            log_event(run_dir, "rows_damaged", state.step, file=name, lines=found.lines, kept_as=found.kept_as.name)
    if state.metric_rows is not None and metrics.rows < state.metric_rows:
        say(
            f"warning: {run_dir / METRICS}: {metrics.rows} rows up to step {state.step}, and the checkpoint counts "
            f"{state.metric_rows}: {state.metric_rows - metrics.rows} are lost; curves and reports will lack them"
        )
        log_event(run_dir, "rows_missing", state.step, file=METRICS, expected=state.metric_rows, found=metrics.rows)


@dataclass(frozen=True, slots=True)
class Goodput:
    """How the time of a run was spent, in seconds."""

    wall: float
    """From the start of its first process to its last sign of life."""
    useful: float
    """In steps that count."""
    lost: Mapping[str, float]
    """Cause -> seconds. Together with `useful` they are `wall`."""
    restarts: int

    @property
    def fraction(self) -> float:
        """Useful time over all time."""
        return self.useful / self.wall if self.wall else 1.0


def goodput(events: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]]) -> Goodput | None:
    """Account for a run's time.

    Args:
        events: of events.jsonl, oldest first.
        rows: of metrics.jsonl.

    Returns:
        None where the history says nothing about times.
    """
    events, rows = list(events), list(rows)
    starts = [event for event in events if "start_seconds" in event]
    if not starts:
        return None
    lost = dict.fromkeys(("down", "starting", "steps done again", "saving", "validation"), 0.0)
    for event in starts:
        lost["starting"] += event["start_seconds"]
        lost["down"] += event.get("down_seconds", 0.0)
        lost["steps done again"] += event.get("repeated_seconds", 0.0)
    lost["saving"] = sum(event.get("seconds", 0.0) for event in events if event["event"] == "saved")
    lost["validation"] = sum(row.get("val_seconds", 0.0) + row.get("tasks_seconds", 0.0) for row in rows)
    useful = sum(row["step_seconds"] for row in rows if "loss" in row)
    wall = _seconds(events[-1]["time"]) - _seconds(starts[0]["time"]) + starts[0]["start_seconds"]
    named = useful + sum(lost.values())
    lost["other"] = max(0.0, wall - named)
    return Goodput(max(wall, named), useful, lost, len(starts) - 1)


def _seconds(time_text: str) -> float:
    return datetime.fromisoformat(time_text).timestamp()
