"""A folder of checkpoints in which every one that can be seen is whole.

    step_00000100.tmp/   being written: each rank's file, then manifest.json, each fsynced
    step_00000100/       published by one rename; valid by its manifest, never by a pointer file

`manifest.json` lists every file with its size and xxh3-128, computed from memory by the rank that wrote it, and holds
the xxh3-128 of its own content.
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
from megagpt.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_CHECKSUM = "xxh3_128"
_STEP_DIR = re.compile(r"step_(\d{8,})")


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

    def to_json(self) -> bytes:
        """As it is written to disk, with the checksum of all the rest."""
        content = asdict(self)
        return (json.dumps(content | {_CHECKSUM: _checksum(content)}, indent=1, sort_keys=True) + "\n").encode()


def _checksum(content: Mapping[str, Any]) -> str:
    """xxh3-128 of a manifest's values, however they are spaced."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def read_manifest(step_dir: Path) -> Manifest:
    """The manifest of one published checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = step_dir / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {content['format']}; this version reads format {FORMAT}")
        if content.pop(_CHECKSUM) != _checksum(content):
            raise CheckpointError(f"{path}: damaged: its content is not what its own checksum says")
        files = {name: FileEntry(**entry) for name, entry in content.pop("files").items()}
        return Manifest(files=files, **content)
    except FileNotFoundError:
        raise CheckpointError(f"{step_dir}: no {MANIFEST}, so this is not a complete checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {error!r}") from None


def verify_file(step_dir: Path, name: str, entry: FileEntry) -> None:
    """Compare one file with the manifest.

    Raises:
        CheckpointError: naming the file and both values.
    """
    path = step_dir / name
    if Path(name).name != name:
        raise CheckpointError(f"{step_dir / MANIFEST}: file name {name!r} leaves the checkpoint's folder")
    try:
        found = FileEntry(*fsio.checksum(path))
    except OSError as error:
        raise CheckpointError(f"{path}: listed in {MANIFEST} but cannot be read: {error.strerror}") from None
    if found != entry:
        raise CheckpointError(
            f"{path}: damaged: {found.bytes} bytes with xxh3-128 {found.xxh3_128}, "
            f"{MANIFEST} says {entry.bytes} bytes with {entry.xxh3_128}"
        )


def verify_checkpoint(step_dir: Path) -> Manifest:
    """Read the manifest and compare every file with it."""
    manifest = read_manifest(step_dir)
    for name, entry in manifest.files.items():
        verify_file(step_dir, name, entry)
    return manifest


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of all published checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = (_STEP_DIR.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def step_dir(self, step: int) -> Path:
        """Folder of a published checkpoint."""
        return self.folder / f"step_{step:08d}"

    def staging_dir(self, step: int) -> Path:
        """Folder in which a checkpoint is being written."""
        return self.folder / f"step_{step:08d}.tmp"

    def begin(self, step: int) -> Path:
        """An empty staging folder; what an interrupted save left behind is removed."""
        staging = self.staging_dir(step)
        if staging.exists():
            fsio.remove_tree(staging)
        fsio.make_dir(staging)
        return staging

    def publish(self, manifest: Manifest) -> Path:
        """Make the staged checkpoint visible, at once and durably."""
        staging, target = self.staging_dir(manifest.step), self.step_dir(manifest.step)
        fsio.write_file(staging / MANIFEST, [manifest.to_json()])
        fsio.flush_folder(staging)
        if target.exists():  # the same step was saved before: a save that stands is not replaced
            raise CheckpointError(f"{target}: exists already; a checkpoint is never overwritten")
        fsio.publish(staging, target)
        return target

    def set_aside(self, step: int) -> Path:
        """Take a damaged checkpoint out of the way without losing what is left of it; its new folder."""
        name = self.step_dir(step).name
        number = sum(1 for _ in self.folder.glob(f"{name}.damaged*"))
        aside = self.folder / f"{name}.damaged{number or ''}"
        fsio.publish(self.step_dir(step), aside)
        return aside

    def prune(self, keep_last: int, keep_every: int) -> list[int]:
        """Remove checkpoints that the retention rule does not keep, and staging folders of dead saves.

        Returns:
            the steps removed.
        """
        steps = self.steps()
        kept = set(steps[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
        removed = [step for step in steps if step not in kept]
        for step in removed:
            doomed = self.step_dir(step).with_suffix(".removed")
            fsio.publish(self.step_dir(step), doomed)  # no half-removed folder under a valid name
            fsio.remove_tree(doomed)
        for leftover in [*self.folder.glob("step_*.tmp"), *self.folder.glob("step_*.removed")]:
            fsio.remove_tree(leftover)
        return removed


def list_checkpoints(run_dir: Path) -> str:
    """A line for each complete checkpoint of a run: step, size, hash."""
    store = _store_of(run_dir)
    lines = []
    for step in store.steps():
        manifest = read_manifest(store.step_dir(step))
        size = sum(entry.bytes for entry in manifest.files.values())
        lines.append(f"step {step:>8}  {size / 2**20:10,.1f} MiB  {len(manifest.files):>5} files  {manifest.hash}")
    return "\n".join(lines) or f"{store.folder}: no complete checkpoint"


def verify_all(run_dir: Path) -> str:
    """Verify every checkpoint of a run.

    Raises:
        CheckpointError: every damaged file of every checkpoint.
    """
    store = _store_of(run_dir)
    problems: list[str] = []
    for step in store.steps():
        try:
            verify_checkpoint(store.step_dir(step))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return f"{store.folder}: {len(store.steps())} checkpoints, every file as its manifest says"


def _store_of(run_dir: Path) -> CheckpointStore:
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name the folder of a run")
    return CheckpointStore(folder)
