"""Where the threads of this process are: for a file, and in one line."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_WAITING = ("torch.distributed", "deepspeed.comm", "megagpt.parallel.mesh", "megagpt.parallel.collectives")
"""Modules in which a process waits for others."""
_OURS = ("megagpt", "data_pipeline", "evals")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the main thread is."""

    where: str
    """File, line and function, the innermost of this package."""
    waits: bool
    """Whether it waits there for other processes."""


def dump_stacks(folder: Path, rank: int, reason: str) -> Path:
    """Write the stacks of all threads to a file of this rank's; it replaces an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank:05d}.txt"
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} rank {rank}: {reason}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    return path


def main_thread_place() -> Place:
    """Where the main thread is now."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return _place(frame)


def _place(innermost: FrameType | None) -> Place:
    waits, where, frame = False, "", innermost
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        waits = waits or module.startswith(_WAITING)
        if not where and module.split(".")[0] in _OURS and not module.startswith(_WAITING):
            where = _words(frame)
        frame = frame.f_back
    return Place(where or (_words(innermost) if innermost is not None else "no Python frame"), waits)


def _words(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} in {frame.f_code.co_name}"
