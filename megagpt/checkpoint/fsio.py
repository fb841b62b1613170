"""Every file operation of a checkpoint. Nothing else writes one, so faults can be put before each call."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import xxhash


def make_dir(path: Path) -> None:
    """Make a folder and its parents."""
    path.mkdir(parents=True, exist_ok=True)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write and fsync a new file.

    Returns:
        (bytes, xxh3-128 in hex), both taken from memory: a bad write cannot hide behind its own checksum.
    """
    digest, size = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def checksum(path: Path) -> tuple[int, str]:
    """(bytes, xxh3-128 in hex) of a file as it lies on disk."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def replace(source: Path, target: Path) -> None:
    """Rename and make the rename durable: the one moment at which something becomes visible."""
    source.replace(target)
    sync_dir(target.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_file(temporary, [content])
    replace(temporary, path)


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a folder that nothing points at any more."""
    shutil.rmtree(path)
