"""When a run is asked to stop: a signal, or the death of the launcher that would have passed one on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

import psutil

ASKED, LAUNCHER_GONE = "asked to", "the launcher had ended"
STOPPED = 128 + signal.SIGTERM
"""Exit code where a stop was asked for and nothing was saved, or nobody has said so."""


class StopRequest:
    """True from SIGTERM (a scheduler's request), SIGUSR1 (its early warning), Ctrl-C, or the end of `deepspeed` itself.

    A second Ctrl-C interrupts at once.

    Args:
        launcher_gone: from `look_at_deepspeed`.
    """

    def __init__(self, launcher_gone: Callable[[], bool]) -> None:
        self._signalled = False
        self._launcher_gone = launcher_gone
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @property
    def requested(self) -> bool:
        """Whether to save and stop."""
        return self._signalled or self._launcher_gone()

    @property
    def cause(self) -> str:
        """Why, where it is requested; a request that came to another process only is one that was made."""
        return ASKED if self._signalled or not self.requested else LAUNCHER_GONE

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signal's signature
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)


def look_at_deepspeed() -> Callable[[], bool]:
    """Tells whether the `deepspeed` two above this process, on the host where it runs, has ended.

    It starts `launch.py`, which starts the ranks; a SIGTERM to the first ends it without a word to the others, and the
    ranks would train on unseen. It may have ended before a rank comes to look. Under any other launcher, and on the
    other hosts, there is none that could.
    """
    this = psutil.Process()
    above = this.parents()
    if above and any("deepspeed.launcher.launch" in word for word in _words(above[0])):
        starter = above[1] if len(above) > 1 else None
        if starter is not None and any(word == "deepspeed" or word.endswith("/deepspeed") for word in _words(starter)):
            return lambda: not _alive(starter)
        was_orphaned = _is_orphan(above[0])
    else:  # launch.py alone names a process so
        was_orphaned = any(word.startswith("--local_rank=") for word in _words(this)) and _is_orphan(this)
    return lambda: was_orphaned


def _is_orphan(process: psutil.Process) -> bool:
    """Whether the process that started it has ended: its session is neither its own nor that of its parent now."""
    try:
        session = os.getsid(process.pid)
        return session not in (process.pid, os.getsid(process.ppid()))
    except (psutil.NoSuchProcess, ProcessLookupError):
        return True


def _alive(process: psutil.Process) -> bool:
    """False also for a process that has ended and whose parent has not asked how."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _words(process: psutil.Process) -> list[str]:
    try:
        return [str(word) for word in process.cmdline()]
    except psutil.Error:
        return []
