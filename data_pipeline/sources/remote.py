"""A remote file read in ranges, each tried again where the network fails."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from megagpt.errors import DataError

WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
"""Trying again does not mend these."""

_FINAL_STATUS = (401, 404, 410)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class RemoteFile(io.RawIOBase):
    """A file of an fsspec file system, read by byte ranges, so that a read that failed can be done again.

    A handle that fsspec keeps open cannot: after an error in the middle of a stream its position is lost. Each new
    attempt is logged with the file, the byte and the error.
    """

    def __init__(self, filesystem: Any, inner: str, path: str) -> None:
        """Ask for the size of `inner`; `path` is its name for messages.

        Raises:
            DataError: it does not exist, or its server does not say how large it is.
        """
        super().__init__()
        self._filesystem = filesystem
        self._inner = inner
        self._path = path
        self._waits_seconds = WAITS_SECONDS
        self._at = 0
        info = self._try("its size", lambda: filesystem.info(inner))
        if info.get("size") is None:
            raise DataError(f"{path}: the server does not say how large the file is; download it first")
        self.size_bytes = int(info["size"])

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move; nothing is fetched."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size_bytes}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        """The byte that is read next."""
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Fetch as much as `buffer` holds, less only at the end of the file.

        Raises:
            DataError: it cannot be read after several attempts, or the server does not serve ranges.
        """
        start, end = self._at, min(self._at + len(buffer), self.size_bytes)
        if start >= end:
            return 0
        data = self._try(f"bytes {start} to {end}", lambda: self._fetch(start, end))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _fetch(self, start: int, end: int) -> bytes:
        data: bytes = self._filesystem.cat_file(self._inner, start, end)
        if len(data) == self.size_bytes > end - start:
            raise DataError(f"{self._path}: the server sends the whole file for a range of it; download it first")
        if len(data) != end - start:
            raise EOFError(f"{len(data)} bytes came in place of {end - start}")
        return data

    def _try(self, what: str, action: Callable[[], _T]) -> _T:
        for attempt in range(len(self._waits_seconds) + 1):
            try:
                return action()
            except DataError:
                raise
            except Exception as error:  # noqa: BLE001 - every file system has errors of its own
                told = f"{type(error).__name__}: {error}"
                if is_final(error):
                    reason = getattr(error, "strerror", None) or told
                    raise DataError(f"{self._path}: cannot be opened: {reason}") from None
                if attempt == len(self._waits_seconds):
                    raise DataError(f"{self._path}: {what} cannot be read in {attempt + 1} attempts: {told}") from None
                wait = self._waits_seconds[attempt]
                _log.warning("%s: %s cannot be read, next attempt in %s s: %s", self._path, what, wait, told)
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def is_final(error: BaseException) -> bool:
    """Whether trying again is no use. fsspec's HTTP says "not found" of every error, with the true one as its cause."""
    if not isinstance(error, _FINAL):
        return False
    cause = error.__cause__
    return cause is None or isinstance(cause, _FINAL) or getattr(cause, "status", None) in _FINAL_STATUS
