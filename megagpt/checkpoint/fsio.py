"""Every file operation of a checkpoint. Nothing else writes one, so faults can be put before each call."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import xxhash

from megagpt.atomic import flush_folder, flush_to_disk, publish

__all__ = ["checksum", "flush_folder", "make_dir", "publish", "remove_tree", "write_file"]


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
        flush_to_disk(file)
    return size, digest.hexdigest()


def checksum(path: Path) -> tuple[int, str]:
    """(bytes, xxh3-128 in hex) of a file as it lies on disk."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def remove_tree(path: Path) -> None:
    """Remove a folder that nothing points at any more."""
    shutil.rmtree(path)
