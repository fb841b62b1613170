"""One writer a folder: a lock that the system releases when its process ends, however it ends."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megagpt.errors import MegaGPTError

LOCK_FILE = ".lock"


@contextmanager
def locked_folder(folder: Path, busy: MegaGPTError) -> Iterator[None]:
    """Make the folder and hold its lock.

    Raises:
        MegaGPTError: `busy`, where another process holds it.
        OSError: the folder cannot be written, or locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # all else, as a server of locks that does not answer, says itself what it is
            raise busy from None
        yield
