"""manifest.json: what a checkpoint is. It may come from anyone, so that nothing in it is believed before it is checked.

It lists every file with its size and xxh3-128, computed from memory by the rank that wrote it, and holds the xxh3-128
of its own content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megagpt.checkpoint import fsio
from megagpt.errors import CheckpointDamaged, CheckpointError, CheckpointIncomplete, CheckpointUnreadable

MANIFEST = "manifest.json"
FORMAT = 1
STEP_DIR = re.compile(r"step_(\d{8,})", re.ASCII)
"""Name of a published checkpoint's folder."""
MAX_BYTES = 64 * 2**20
"""Size above which a manifest is refused unread; a hundred thousand ranks' files take 12 MiB."""
_CHECKSUM = "xxh3_128"
_HEX = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file as its writer had it in memory."""

    bytes: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is: enough to verify it, and to rebuild model, tokenizer and position without anything else."""

    step: int
    files: Mapping[str, FileEntry]
    state: Mapping[str, Any]
    """TrainState as plain values."""
    config: Mapping[str, Any]
    """The resolved configuration of the run."""
    data_fingerprint: str | None
    """Identity of the training samples and their order; None for imported weights that have not trained here."""
    tokenizer: Mapping[str, Any] | None
    versions: Mapping[str, str]
    format: int = FORMAT

    @property
    def hash(self) -> str:
        """Identity of the weights: equal for equal files of an equal model."""
        content = {
            "files": {name: entry.xxh3_128 for name, entry in sorted(self.files.items())},
            "model": self.config["model"],
        }
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())

    @property
    def n_bytes(self) -> int:
        """Size of all its files."""
        return sum(entry.bytes for entry in self.files.values())

    def to_json(self) -> bytes:
        """As it is written to disk, with the checksum of all the rest."""
        content = asdict(self)
        return _as_written(content | {_CHECKSUM: _checksum(content)})


def _as_written(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _checksum(content: Mapping[str, Any]) -> str:
    """xxh3-128 of a manifest's values, however they are spaced."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_manifest(step_dir: Path) -> Manifest:
    """The manifest of one published checkpoint.

    Raises:
        CheckpointIncomplete: there is none.
        CheckpointUnreadable: it could not be read.
        CheckpointDamaged: it is not what a save writes.
        CheckpointError: it is whole, and of a format that this version does not read.
    """
    path = step_dir / MANIFEST
    try:
        with fsio.open_regular(path) as file:
            written = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointIncomplete(f"{step_dir}: no {MANIFEST}, so this is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointUnreadable(f"{path}: cannot be read: {error.strerror}") from None
    if len(written) > MAX_BYTES:
        raise CheckpointDamaged(f"{path}: over {MAX_BYTES >> 20} MiB, which no manifest has")
    try:
        return _parsed(written, path)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointDamaged(f"{path}: damaged: {_short(error)}") from None


def _parsed(written: bytes, path: Path) -> Manifest:
    content = json.loads(written)
    written_format, told = content["format"], content.pop(_CHECKSUM, None)
    whole = told == _checksum(content)
    if written_format != FORMAT:
        other = f"{path}: format {written_format!r}; this version reads format {FORMAT}"
        raise (
            CheckpointError(other) if whole else CheckpointDamaged(f"{other}, or it is damaged: its checksum is wrong")
        )
    if not whole:
        raise CheckpointDamaged(f"{path}: damaged: its content is not what its own checksum says")
    if written != _as_written(
        content | {_CHECKSUM: told}
    ):  # spaces, a name twice: one reader sees what another does not
        raise CheckpointDamaged(f"{path}: damaged: its bytes are not those that a save writes for its content")
    files = {_plain_name(name): _entry(name, **entry) for name, entry in content.pop("files").items()}
    manifest = Manifest(files=files, **content)
    _check_kinds(manifest)
    named = STEP_DIR.fullmatch(path.parent.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointDamaged(f"{path}: is of step {manifest.step}: the folder was renamed, or belongs elsewhere")
    return manifest


def _plain_name(name: str) -> str:
    if Path(name).name != name or name in ("", "..") or "\0" in name:
        raise ValueError(f"file name {name!r} leaves the checkpoint's folder")
    return name


def _entry(file: str, bytes: int, xxh3_128: str) -> FileEntry:  # noqa: A002 - the manifest's word
    if type(bytes) is not int or bytes < 0 or not _HEX.fullmatch(xxh3_128):
        raise ValueError(f"{file!r}: {bytes!r} bytes, xxh3-128 {xxh3_128!r}")
    return FileEntry(bytes, xxh3_128)


def _check_kinds(manifest: Manifest) -> None:
    """Each value is of its kind; what its inside means, its readers check."""
    kinds: dict[str, Any] = {
        "step": int,
        "state": dict,
        "config": dict,
        "data_fingerprint": str | None,
        "tokenizer": dict | None,
        "versions": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(getattr(manifest, key), kind):
            raise ValueError(f"{key} is {getattr(manifest, key)!r}")
    if isinstance(manifest.step, bool) or manifest.step < 0 or not isinstance(manifest.config["model"], dict):
        raise ValueError(f"step is {manifest.step!r}, config.model {manifest.config['model']!r}")


def _short(error: Exception) -> str:
    told = repr(error)
    return told if len(told) <= 300 else f"{told[:300]}..."


def verify_file(step_dir: Path, name: str, entry: FileEntry, *, from_disk: bool = False) -> None:
    """Compare one file with the manifest.

    Args:
        step_dir: of the checkpoint.
        name: of the file.
        entry: what the manifest says about it.
        from_disk: read what lies on the disk, not what the system still holds of it in memory.

    Raises:
        CheckpointDamaged: naming the file and both values.
        CheckpointUnreadable: naming the file.
    """
    path = step_dir / name
    says = f"{MANIFEST} says {entry.bytes} bytes with {entry.xxh3_128}"
    try:
        with fsio.open_regular(path) as file:
            size = file.seek(0, 2)
        if size != entry.bytes:
            raise CheckpointDamaged(f"{path}: damaged: {size} bytes, {says}")
        found = FileEntry(*fsio.checksum(path, from_disk=from_disk))
    except OSError as error:
        raise CheckpointUnreadable(f"{path}: listed in {MANIFEST} but cannot be read: {error.strerror}") from None
    if found != entry:
        raise CheckpointDamaged(f"{path}: damaged: {found.bytes} bytes with xxh3-128 {found.xxh3_128}, {says}")


def verify_checkpoint(step_dir: Path) -> Manifest:
    """Read the manifest and compare every file with it."""
    manifest = read_manifest(step_dir)
    for name, entry in manifest.files.items():
        verify_file(step_dir, name, entry)
    return manifest
