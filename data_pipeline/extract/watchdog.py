"""A time limit for every page, at a few microseconds a page, and a page that kills its worker is not tried twice.

Two timers of the kernel count the processor time that a page takes (not the wall clock, so that a busy machine or a
slow disk costs no page):

* soft, `timeout_seconds`: an exception inside Python code; the page is rejected, the worker goes on.
* hard, HARD_FACTOR times that, for C code that never returns to Python: the signal's handler, which needs no
  interpreter lock, writes a trace and the process ends. Crashes of C code leave the same evidence.

The hard limit needs someone who starts the task again, so it is on only where a `poison` file is given: beside it lies
`POISON.work` with the page in work and the evidence. The next attempt convicts the page if there is evidence, and only
then: a worker killed from outside leaves none, and no page pays for that.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from megagpt.atomic import write_file

TIMEOUT = "extract.timeout"
MEMORY = "extract.memory"
FAILED = "extract.failed"
CRASHED = "extract.crashed"
HARD_FACTOR = 3.0

_SLOT_BYTES = 8
_CRASH_EVIDENCE = b"Fatal Python error"


class PageRejected(Exception):  # noqa: N818 - a verdict, no error
    """An extractor refuses a page; `reason` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _PageTimeoutError(BaseException):
    """Not an Exception: extractors catch those of their own and go on."""


class Watchdog:
    """Runs an extractor on one page after another under both limits; a context manager.

    In a thread other than the main one Python delivers no signals: there is no soft limit there, the hard one holds.
    """

    def __init__(self, timeout_seconds: float, poison: Path | None = None) -> None:
        self._timeout_seconds = timeout_seconds
        self._poison = poison
        self._pages: dict[int, str] = {}
        self._work = -1
        self._armed = False
        self._soft = False
        self._old_handler: Any = None
        self._old_faulthandler = False

    def __enter__(self) -> Self:
        if self._poison is not None:
            self._pages = _convict(self._poison, self._timeout_seconds)
            self._work = os.open(_work_file(self._poison), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.lseek(self._work, _SLOT_BYTES, os.SEEK_SET)
            self._old_faulthandler = faulthandler.is_enabled()
            faulthandler.enable(self._work, all_threads=False)
            # chain: after the trace, what the signal does by default, the end of the process.
            faulthandler.register(signal.SIGVTALRM, self._work, all_threads=False, chain=True)
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGPROF, self._on_timer)
            self._soft = True
        return self

    def __exit__(self, *error: object) -> None:
        self._disarm()
        if self._soft:
            signal.signal(signal.SIGPROF, self._old_handler)
            self._soft = False
        if self._poison is not None:
            faulthandler.unregister(signal.SIGVTALRM)
            faulthandler.disable()
            if self._old_faulthandler and sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)
            os.close(self._work)
            _work_file(self._poison).unlink(missing_ok=True)
            self._work = -1

    def run(
        self, ordinal: int, extract: Callable[[bytes, str], str], page: bytes, http_charset: str
    ) -> tuple[str, str]:
        """The page's text, or the reason why there is none; nothing that an extractor does ends the task.

        Args:
            ordinal: the record's, by which a later attempt knows the page again.
            extract: the extractor.
            page: undecoded.
            http_charset: what the HTTP header said.
        """
        if ordinal in self._pages:
            return "", self._pages[ordinal]
        try:
            try:
                self._arm(ordinal)
                return extract(page, http_charset), ""
            finally:
                self._disarm()
        except _PageTimeoutError:
            self._disarm()  # once more: it may have been raised in there
            return "", TIMEOUT
        except PageRejected as rejected:
            return "", rejected.reason
        except MemoryError:
            return "", MEMORY
        except Exception:  # noqa: BLE001 - whatever a page makes a library do, it is that page's end alone
            return "", FAILED

    def _arm(self, ordinal: int) -> None:
        seconds = self._timeout_seconds
        if self._work >= 0:
            os.pwrite(self._work, (ordinal + 1).to_bytes(_SLOT_BYTES, "little"), 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, HARD_FACTOR * seconds)
        self._armed = True
        if self._soft:
            # Again and again: code that is called back from C may lose an exception.
            signal.setitimer(signal.ITIMER_PROF, seconds, seconds / 4)

    def _disarm(self) -> None:
        self._armed = False
        if self._soft:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if self._work >= 0:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            os.pwrite(self._work, bytes(_SLOT_BYTES), 0)

    def _on_timer(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self._armed:
            raise _PageTimeoutError


def ended_by_a_page(poison: Path) -> bool:
    """Whether a worker that is gone was ended by a page: then the task may be started again and will pass over it."""
    return _evidence(poison) is not None


def forget(poison: Path) -> None:
    """Remove what earlier attempts have noted: under other code, other pages may be deadly."""
    poison.unlink(missing_ok=True)
    _work_file(poison).unlink(missing_ok=True)


def read_poison(poison: Path) -> dict[int, str]:
    """The pages that ended earlier attempts, by ordinal, with the reason they are rejected for."""
    try:
        pages = json.loads(poison.read_bytes())["pages"]
    except FileNotFoundError:
        return {}
    return {int(ordinal): str(reason) for ordinal, reason in pages.items()}


def _convict(poison: Path, timeout_seconds: float) -> dict[int, str]:
    """Add the page that ended the last attempt, if one did; verdicts under a shorter limit are void."""
    pages = read_poison(poison)
    if pages and json.loads(poison.read_bytes())["timeout_seconds"] < timeout_seconds:
        pages = {ordinal: reason for ordinal, reason in pages.items() if reason != TIMEOUT}
    found = _evidence(poison)
    if found is not None:
        pages[found[0]] = found[1]
        values = {"timeout_seconds": timeout_seconds, "pages": {str(n): pages[n] for n in sorted(pages)}}
        write_file(poison, json.dumps(values, indent=1).encode())
    return pages


def _evidence(poison: Path) -> tuple[int, str] | None:
    try:
        data = _work_file(poison).read_bytes()
    except FileNotFoundError:
        return None
    ordinal = int.from_bytes(data[:_SLOT_BYTES], "little") - 1
    trace = data[_SLOT_BYTES:]
    if ordinal < 0 or not trace:
        return None
    return ordinal, CRASHED if trace.startswith(_CRASH_EVIDENCE) else TIMEOUT


def _work_file(poison: Path) -> Path:
    return poison.with_name(poison.name + ".work")
