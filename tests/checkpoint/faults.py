"""Something goes wrong at the k-th call that a save makes to the file system."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

CALLS = ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir")


class Killed(BaseException):
    """The process is gone: nothing catches it, and nothing that runs afterwards reaches the disk."""


class FileSystem:
    """Counts the calls that change something; from the k-th on they fail (`once`: only the k-th)."""

    def __init__(self, k: int, failure: Callable[[], BaseException], *, once: bool) -> None:
        self.calls = 0
        self._k, self._failure, self._once = k, failure, once

    @property
    def failed(self) -> bool:
        return self.calls >= self._k

    def check(self) -> None:
        self.calls += 1
        if self.calls == self._k or (self.calls > self._k and not self._once):
            raise self._failure()

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            self.check()
            return call(*args, **kwargs)

        return checked


class _File:
    """A file being written; a write that fails has written half."""

    def __init__(self, file: Any, system: FileSystem) -> None:
        self._file, self._system = file, system

    def write(self, content: Any) -> int:
        try:
            self._system.check()
        except BaseException:
            self._file.write(bytes(content)[: len(content) // 2])
            raise
        return self._file.write(content)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing_at(k: int, failure: Callable[[], BaseException], *, once: bool = False) -> Iterator[FileSystem]:
    system = FileSystem(k, failure, once=once)
    path_open = Path.open

    def open_checked(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" not in mode:
            return path_open(path, mode, *args, **kwargs)
        system.check()
        return _File(path_open(path, mode, *args, **kwargs), system)

    patches = [patch.object(os, name, system.wrap(getattr(os, name))) for name in CALLS]
    patches.append(patch.object(Path, "open", open_checked))
    for one in patches:
        one.start()
    try:
        yield system
    finally:
        for one in patches:
            one.stop()


def killed() -> BaseException:
    return Killed()


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def io_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))
