"""When a run is asked to stop: a signal, or the death of the launcher that would have passed one on."""

from __future__ import annotations

import signal
from types import FrameType

import psutil

ASKED, LAUNCHER_GONE = "asked to", "the launcher had ended"


class StopRequest:
    """True from SIGTERM (a scheduler's request), SIGUSR1 (its early warning), Ctrl-C, or the end of `deepspeed` itself.

    A second Ctrl-C interrupts at once.

    `deepspeed` starts `launch.py`, which starts the ranks; a SIGTERM to the first ends it without a word to the others,
    and the ranks would train on unseen.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = _deepspeed_above()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    @property
    def requested(self) -> bool:
        """Whether to save and stop."""
        return self._signalled or (self._launcher is not None and not _alive(self._launcher))

    @property
    def cause(self) -> str:
        """Why, where it is requested; a request that came to another process only is one that was made."""
        return ASKED if self._signalled or not self.requested else LAUNCHER_GONE

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - signal's signature
        self._signalled = True
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)


def _deepspeed_above() -> psutil.Process | None:
    """The `deepspeed` process two above this one, on the host where it runs; None under any other launcher."""
    ancestors = psutil.Process().parents()
    if len(ancestors) < 2 or not any("deepspeed.launcher.launch" in word for word in _words(ancestors[0])):
        return None
    is_deepspeed = any(word.endswith("/deepspeed") or word == "deepspeed" for word in _words(ancestors[1]))
    return ancestors[1] if is_deepspeed else None


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
