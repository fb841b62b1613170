"""The lock under which PyTorch builds and loads C++ operations, such that a killed process does not keep it for ever.

DeepSpeed's operations are built by `torch.utils.cpp_extension`, and each process takes a lock beside them when it
starts, also where they are built already. PyTorch's lock is a file that exists: who is killed while he has it leaves it
behind, and every later process on this machine waits for it without end or message. Here the file is locked as well,
which the kernel undoes when a process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import torch.utils.cpp_extension

MARK = b"locked by the kernel (flock)\n"
"""Content of a file of ours: where nobody has its lock, nobody holds it."""
FOREIGN_SECONDS = 600.0
"""Age at which a file that another program made by PyTorch's own rule counts as left behind; builds take minutes."""
_UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def use_locks_that_end_with_their_process() -> None:
    """Let PyTorch build and load operations under this lock, from now on in this process."""
    torch.utils.cpp_extension.FileBaton = KernelLock  # type: ignore[assignment,misc,attr-defined,unused-ignore]


class KernelLock:
    """In the place of `torch.utils.file_baton.FileBaton` (PyTorch 2.13), which see for the methods.

    Args:
        lock_file_path: the file.
        wait_seconds: between two looks at a file that another program made.
        warn_after_seconds: not used; the watch tells of a start that takes too long.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:  # noqa: ARG002 - PyTorch's signature
        self._path = Path(lock_file_path)
        self._wait_seconds = wait_seconds
        self._descriptor = -1

    def try_acquire(self) -> bool:
        """True where this process is to build. False where another one has: it waits until that is done or has died."""
        while True:
            try:
                self._descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
            except FileExistsError:
                taken_over = self._taken_over()
                if taken_over is not None:
                    return taken_over
                time.sleep(self._wait_seconds)
                if not self._path.exists():
                    return False
                continue
            _lock(self._descriptor)
            os.write(self._descriptor, MARK)
            return True

    def _taken_over(self) -> bool | None:
        """True: whoever made the file is gone. False: he has removed it. None: he may be at work."""
        try:
            descriptor = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return False
        is_locked = _lock(descriptor)  # waits
        try:
            found, ours = self._path.stat(), os.fstat(descriptor)
        except FileNotFoundError:
            os.close(descriptor)
            return False
        if found.st_ino != ours.st_ino:
            os.close(descriptor)
            return False
        is_marked = os.read(descriptor, len(MARK)) == MARK
        if (is_locked and is_marked) or time.time() - found.st_mtime > FOREIGN_SECONDS:
            os.pwrite(descriptor, MARK, 0)
            self._descriptor = descriptor
            return True
        os.close(descriptor)
        return None

    def wait(self) -> None:
        """Nothing: `try_acquire` has waited."""

    def release(self) -> None:
        """Remove the file, then let those see it who wait for its lock."""
        self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def _lock(descriptor: int) -> bool:
    """Wait for the lock; False where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True
