"""Where thousands of small files are made."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def folder_in_memory(otherwise: Path) -> Iterator[Path]:
    """A folder in memory where there is one, because flushing a real disk takes most of the time and is not tried."""
    here = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else otherwise
    with tempfile.TemporaryDirectory(dir=here) as folder:
        yield Path(folder)
