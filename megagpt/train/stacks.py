"""Where the threads of this process are: for a file, and in one line."""

from __future__ import annotations

import faulthandler
import linecache
import re
import sys
import threading
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import FrameType

_WAITING = (
    "torch.distributed",
    "torch.cuda",
    "deepspeed.comm",
    "megagpt.parallel.mesh",
    "megagpt.parallel.collectives",
)
"""Modules in which a process waits for others, or for its device, on which a collective of NCCL waits for others."""
_FROM_DEVICE = re.compile(r"\.(item|tolist|cpu|numpy|synchronize)\(\)$")
"""Calls that wait for the device in C, without a Python frame of their own."""
_OURS = ("megagpt", "data_pipeline", "evals")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a thread is."""

    where: str
    """File, line and function, the innermost of this package."""
    waits: bool
    """Whether it waits there for other processes, or for its device."""


def dump_stacks(folder: Path, rank: int, reason: str) -> Path:
    """Write the stacks of all threads to a file of this rank's; it replaces an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank:05d}.txt"
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} rank {rank}: {reason}\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
    return path


def place_of(thread: int | None) -> Place:
    """Where a thread is now.

    Args:
        thread: its identifier, as `threading.get_ident` tells it.
    """
    return _place(sys._current_frames().get(thread or 0))


def main_thread_place() -> Place:
    """Where the main thread is now."""
    return place_of(threading.main_thread().ident)


def _place(innermost: FrameType | None) -> Place:
    """What a thread does inside of `Mesh.on_main` and the like is work: only what lies further in can wait."""
    waits, where, frame = innermost is not None and _asks_device(innermost), "", innermost
    while frame is not None and not where:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(_WAITING):
            waits = True
        elif module.split(".")[0] in _OURS:
            where = _words(frame)
        frame = frame.f_back
    return Place(where or (_words(innermost) if innermost is not None else "no Python frame"), waits)


def _asks_device(frame: FrameType) -> bool:
    """Whether the call in which the frame's code stands is one that gets values from the device."""
    positions = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), None)
    if positions is None or positions[1] is None or positions[3] is None:
        return False
    line = linecache.getline(frame.f_code.co_filename, positions[1]).encode()[: positions[3]]
    return _FROM_DEVICE.search(line.decode(errors="replace")) is not None


def _words(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} in {frame.f_code.co_name}"
