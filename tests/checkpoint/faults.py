"""Something goes wrong at the k-th call that a save makes to the file system."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.checkpoint.calls import standing_in


class Killed(BaseException):
    """The process is gone: nothing catches it, and nothing that runs afterwards reaches the disk."""


class FileSystem:
    """Counts the calls that change something; from the k-th on they fail (`once`: only the k-th).

    A write that fails has written half.
    """

    def __init__(self, k: int, failure: Callable[[], BaseException], *, once: bool) -> None:
        self.calls = 0
        self._k, self._failure, self._once = k, failure, once
        self._lock = threading.Lock()

    def handle(self, name: str, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:
            self.calls += 1
            fails = self.calls == self._k or (self.calls > self._k and not self._once)
        if not fails:
            return call()
        if name == "write":
            _write(args[0], bytes(args[1])[: len(args[1]) // 2])
        raise self._failure()


_write = os.write


@contextmanager
def failing_at(k: int, failure: Callable[[], BaseException], *, once: bool = False) -> Iterator[FileSystem]:
    system = FileSystem(k, failure, once=once)
    with standing_in(system.handle):
        yield system


@contextmanager
def writing_at_most(n_bytes: int) -> Iterator[None]:
    """The system takes no more bytes in one call; it may do so at any time."""

    def handle(name: str, call: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _write(args[0], bytes(args[1])[:n_bytes]) if name == "write" else call()

    with standing_in(handle):
        yield


def killed() -> BaseException:
    return Killed()


def killed_for_good() -> BaseException:
    """SIGKILL to this very process."""
    os.kill(os.getpid(), signal.SIGKILL)
    return Killed()


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


def over_quota() -> OSError:
    return OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def too_many_files() -> OSError:
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))
