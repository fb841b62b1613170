"""Opening and finding files, local or (where the path is an address such as s3://...) through fsspec."""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

import fsspec

from data_pipeline.sources.record import CHUNK_BYTES
from megagpt.errors import DataError


def open_file(path: str) -> BinaryIO:
    """A seekable, buffered file.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        if _is_remote(path):
            return cast(BinaryIO, fsspec.open(path, "rb", block_size=8 * CHUNK_BYTES).open())
        return cast(BufferedReader, Path(path).open("rb", buffering=CHUNK_BYTES))
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}") from None


def find_files(path: str) -> list[tuple[str, int]]:
    """The files that a path, folder or glob stands for, with their sizes in bytes, sorted by name.

    A folder stands for every file in it and below. As in a shell, names that begin with a dot match no wildcard.
    """
    if _is_remote(path):
        return _find_remote(path)
    exact = Path(path)
    if exact.is_file():
        found = [exact]
    elif exact.is_dir():
        found = [file for file in exact.rglob("*") if not _is_hidden(file.relative_to(exact))]
    else:
        anchor, pattern = _split_glob(exact)
        found = list(anchor.glob(pattern)) if pattern else []
        found = [file for file in found if not _is_hidden(file.relative_to(anchor))]
    return sorted((str(file), file.stat().st_size) for file in found if file.is_file())


def _find_remote(path: str) -> list[tuple[str, int]]:
    filesystem, inner = fsspec.core.url_to_fs(path)
    if filesystem.isdir(inner):
        inner = inner.rstrip("/") + "/**"
    found = filesystem.glob(inner, detail=True)
    return sorted(
        (filesystem.unstrip_protocol(name), int(info["size"])) for name, info in found.items() if info["type"] == "file"
    )


def _split_glob(path: Path) -> tuple[Path, str]:
    """The longest leading folder without wildcards, and the rest."""
    for depth, part in enumerate(path.parts):
        if any(sign in part for sign in "*?["):
            return Path(*path.parts[:depth]), str(Path(*path.parts[depth:]))
    return path, ""


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_remote(path: str) -> bool:
    return "://" in path
