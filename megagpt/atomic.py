"""A file is there whole or not at all: temporary name beside the target, fsync, rename, fsync the folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def temporary_name(target: Path) -> Path:
    """Where `target` is written before it is published; always the same, so that killed runs leave one."""
    return target.with_name(target.name + ".tmp")


def flush_to_disk(file: BinaryIO) -> None:
    """Return when what was written to `file` survives a power cut."""
    file.flush()
    os.fsync(file.fileno())


def publish(temporary: Path, target: Path) -> None:
    """Give a finished, flushed file its name, in place of an older one."""
    temporary.replace(target)
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(target: Path, content: bytes) -> None:
    """Write a small file whole or not at all; the folder is made if absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    with temporary.open("wb") as file:
        file.write(content)
        flush_to_disk(file)
    publish(temporary, target)


def replace_file(target: Path, content: bytes) -> None:
    """Write a small file whole or not at all, without waiting for the disk: for what is soon written again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    temporary.write_bytes(content)
    temporary.replace(target)
