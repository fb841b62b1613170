"""Opening and finding files, local or (where the path is an address such as s3://...) through fsspec."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipeline.sources.credentials import check_no_credentials
from data_pipeline.sources.record import CHUNK_BYTES
from data_pipeline.sources.remote import RemoteFile, is_final
from megagpt.errors import DataError

_REMOTE_READ_BYTES = 8 * CHUNK_BYTES
_GZIP_MAGIC = b"\x1f\x8b"
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "ssh": "paramiko",
    "sftp": "paramiko",
}


def open_file(path: str) -> BinaryIO:
    """A seekable, buffered file; reads of a remote one are tried again where they fail.

    Raises:
        DataError: it cannot be opened, or its protocol needs a package that is not installed.
    """
    try:
        if is_remote(path):
            filesystem, inner = _filesystem(path)
            return cast(BinaryIO, BufferedReader(RemoteFile(filesystem, inner, path), _REMOTE_READ_BYTES))
        return cast(BufferedReader, Path(path).open("rb", buffering=CHUNK_BYTES))
    except OSError as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror or error}") from None


def find_files(path: str) -> list[tuple[str, int]]:
    """The files that a path, folder or glob stands for, with their sizes in bytes, sorted by name.

    A folder stands for every file in it and below. As in a shell, names that begin with a dot match no wildcard.

    Raises:
        DataError: a remote folder cannot be listed, or its protocol needs a package that is not installed.
    """
    if is_remote(path):
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


def read_paths_file(path: Path) -> list[str]:
    """The lines of a text file, plain or gzip, without blank ones and comments (#).

    Raises:
        DataError: it is missing, damaged, not UTF-8, holds no line, one twice, or one with a secret in it.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data.startswith(_GZIP_MAGIC) else data).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: the list of paths cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the list of paths is not UTF-8 at byte {error.start}") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"{path}: the list of paths is empty; it holds one path or address a line")
    for number, line in enumerate(lines, start=1):
        check_no_credentials(line, f"{path}: entry {number}")
    twice = next((line for line, n in Counter(lines).items() if n > 1), None)
    if twice is not None:
        raise DataError(f"{path}: {twice} is listed twice; its documents would be read twice")
    return lines


def is_remote(path: str) -> bool:
    """Whether fsspec has to be asked for it."""
    return "://" in path


def _filesystem(path: str) -> tuple[Any, str]:
    import fsspec  # takes asyncio with it, which local files do not need

    protocol = path.partition("://")[0]
    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = f"pip install {package}" if package else "install what it names"
        raise DataError(f"{path}: {protocol}:// needs a package that is not installed ({error}); {fix}") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}; known are {', '.join(sorted(_PACKAGES))} and what fsspec knows") from None
    return filesystem, inner


def _find_remote(path: str) -> list[tuple[str, int]]:
    filesystem, inner = _filesystem(path)
    try:
        if not any(sign in inner for sign in "*?["):
            info = filesystem.info(inner)
            if info["type"] == "file":
                return [(path, int(info.get("size") or 0))]
            inner = inner.rstrip("/") + "/**"
        found = filesystem.glob(inner, detail=True)
    except Exception as error:  # noqa: BLE001 - every file system has errors of its own
        if isinstance(error, FileNotFoundError) and is_final(error):
            return []
        raise DataError(f"{path}: cannot be listed: {type(error).__name__}: {error}") from None
    files = {filesystem.unstrip_protocol(name): info for name, info in found.items() if info["type"] == "file"}
    return sorted(
        (name, int(info.get("size") or 0))
        for name, info in files.items()
        if not _is_hidden(Path(name.partition("://")[2]))
    )


def _split_glob(path: Path) -> tuple[Path, str]:
    """The longest leading folder without wildcards, and the rest."""
    for depth, part in enumerate(path.parts):
        if any(sign in part for sign in "*?["):
            return Path(*path.parts[:depth]), str(Path(*path.parts[depth:]))
    return path, ""


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
