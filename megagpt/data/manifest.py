"""manifest.json, beside the token files: what they hold, what made them, the hashes that prove it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megagpt.atomic import write_file
from megagpt.data.indexed import TokenFile, bin_path, idx_path
from megagpt.errors import DataError, unread

MANIFEST_NAME = "manifest.json"
_BLOCK_BYTES = 8 << 20  # read at a time; a multiple of every token size


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and content of one file."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    bytes: int
    xxh3_128: str
    """In hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class TokenFileEntry:
    """One .bin/.idx pair."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    n_tokens: int
    n_documents: int
    dtype: str
    max_token_id: int
    """-1 where there are no tokens."""
    bin: FileDigest
    idx: FileDigest
    text_bytes: int
    """UTF-8 bytes of the documents' text, without separators: what bits per byte are counted by."""
    sources: dict[str, Any]
    """What the preparation says about each source: documents, tokens ..."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest.json."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    tokenizer: dict[str, Any]
    """`Tokenizer.describe()`."""
    files: dict[str, TokenFileEntry]
    """Prefix without folder -> entry."""
    job: dict[str, Any]
    """The resolved configuration of the preparation."""
    job_hash: str
    format: Literal[1] = 1

    @property
    def hash(self) -> str:
        """xxh3_128 of the content, however the file is spaced and ordered; a run records it."""
        content = _adapter().dump_python(self, mode="json")
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write manifest.json whole or not at all; returns its path."""
    path = folder / MANIFEST_NAME
    write_file(path, _adapter().dump_json(manifest, indent=2) + b"\n")
    return path


def read_manifest(prefix_or_folder: Path) -> Manifest | None:
    """The manifest of a folder of token files, or of the folder that a pair lies in; None if absent.

    Raises:
        DataError: it cannot be read, is no JSON, or a key is missing, unknown or of the wrong type.
    """
    path = _manifest_path(prefix_or_folder)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unread(error, DataError, f"{path}: cannot be read: {error.strerror}") from None
    try:
        return _adapter().validate_json(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'file'}: {problem['msg']}"
            for problem in error.errors(include_url=False)
        )
        raise DataError(f"{path}: not a manifest of format 1: {problems}") from None


def describe_file(
    prefix: Path,
    *,
    text_bytes: int,
    sources: dict[str, Any],
    on_bytes: Callable[[int], None] | None = None,
) -> TokenFileEntry:
    """Read a pair once and make its entry.

    Args:
        prefix: the pair.
        text_bytes: UTF-8 bytes of the text that the tokens stand for.
        sources: what is known about where the documents come from.
        on_bytes: told the bytes read since it was last told, for a progress bar.

    Raises:
        DataError: the pair is not in order.
    """
    token_file = TokenFile.open(prefix)
    bin_digest, max_token_id = _digest(bin_path(prefix), on_bytes, token_file.dtype)
    idx_digest, _ = _digest(idx_path(prefix), on_bytes)
    return TokenFileEntry(
        n_tokens=token_file.n_tokens,
        n_documents=token_file.n_documents,
        dtype=token_file.dtype.name,
        max_token_id=max_token_id,
        bin=bin_digest,
        idx=idx_digest,
        text_bytes=text_bytes,
        sources=sources,
    )


def check_counts(token_file: TokenFile, manifest: Manifest) -> TokenFileEntry:
    """The pair's entry, after a comparison of everything that opening has already read.

    Raises:
        DataError: the manifest does not list the pair, or says other counts.
    """
    path = _manifest_path(token_file.prefix)
    entry = manifest.files.get(token_file.prefix.name)
    if entry is None:
        listed = ", ".join(sorted(manifest.files)) or "nothing"
        raise DataError(f"{path}: does not list {token_file.prefix.name}; it lists {listed}")
    found = {
        "n_tokens": token_file.n_tokens,
        "n_documents": token_file.n_documents,
        "dtype": token_file.dtype.name,
    }
    for key, value in found.items():
        if getattr(entry, key) != value:
            raise DataError(
                f"{token_file.prefix}: {key} is {value}, but {path} says {getattr(entry, key)}: "
                "the token files are not the ones that the manifest was written for"
            )
    return entry


def verify_token_file(prefix: Path, on_bytes: Callable[[int], None] | None = None) -> None:
    """Read a pair from end to end and compare it with its manifest.

    Args:
        prefix: the pair.
        on_bytes: told the bytes read since it was last told, for a progress bar.

    Raises:
        DataError: no manifest, or a count, size or hash is not as it says; names the file and both values.
    """
    token_file = TokenFile.open(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        raise DataError(f"{_manifest_path(prefix)}: no such file; without it {prefix} cannot be verified")
    entry = check_counts(token_file, manifest)
    for path, expected in ((idx_path(prefix), entry.idx), (bin_path(prefix), entry.bin)):
        found, _ = _digest(path, on_bytes)
        if found != expected:
            raise DataError(
                f"{path}: {found.bytes} bytes with xxh3_128 {found.xxh3_128}, but {_manifest_path(prefix)} "
                f"says {expected.bytes} bytes with {expected.xxh3_128}: damaged, or replaced since it was written"
            )


@functools.cache
def _adapter() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def _manifest_path(prefix_or_folder: Path) -> Path:
    folder = prefix_or_folder if prefix_or_folder.is_dir() else prefix_or_folder.parent
    return folder / MANIFEST_NAME


def _digest(
    path: Path, on_bytes: Callable[[int], None] | None, dtype: np.dtype[np.integer] | None = None
) -> tuple[FileDigest, int]:
    """The file's digest and, where it holds tokens of type `dtype`, the largest one (else -1)."""
    hasher = xxhash.xxh3_128()
    n_bytes, largest = 0, -1
    with path.open("rb") as file:  # buffered: a read is short only at the end, so that no token is cut in two
        while block := file.read(_BLOCK_BYTES):
            hasher.update(block)
            n_bytes += len(block)
            if dtype is not None:
                largest = max(largest, int(np.frombuffer(block, dtype).max()))
            if on_bytes is not None:
                on_bytes(len(block))
    return FileDigest(n_bytes, hasher.hexdigest()), largest
