"""A folder of checkpoints in which every one that can be seen is whole.

    step_00000100.tmp/   being written: each rank's file, then manifest.json, each fsynced
    step_00000100/       published by one rename; valid by its manifest, never by a pointer file

What else lies there is no checkpoint: `survey` names it and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megagpt.checkpoint import fsio
from megagpt.checkpoint.manifest import (
    MANIFEST,
    STEP_DIR,
    FileEntry,
    Manifest,
    read_manifest,
    verify_checkpoint,
    verify_file,
)
from megagpt.errors import CheckpointError

__all__ = [
    "CheckpointStore",
    "FileEntry",
    "Manifest",
    "Survey",
    "read_manifest",
    "verify_checkpoint",
    "verify_file",
]

UNFINISHED = ".tmp"
REMOVED = ".removed"


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies in a folder of checkpoints."""

    steps: list[int]
    """Of the published checkpoints, oldest first."""
    rejected: Mapping[str, str]
    """Name -> why it is no checkpoint, of everything else."""

    @property
    def is_fresh(self) -> bool:
        """Nothing was ever saved here: at most a first save was begun and not finished."""
        return not self.steps and all(name.endswith(UNFINISHED) for name in self.rejected)

    def told(self) -> str:
        """What was rejected, for a person; nothing where nothing was."""
        return "; ".join(f"{name} {why}" for name, why in self.rejected.items())


class CheckpointStore:
    """The checkpoints of one run. One process at a time changes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def survey(self) -> Survey:
        """Everything that lies here.

        Raises:
            CheckpointError: the folder cannot be read, or is none.
        """
        steps: list[int] = []
        rejected: dict[str, str] = {}
        try:
            found = sorted(self.folder.iterdir())
        except FileNotFoundError:
            if self.folder.is_symlink():
                raise CheckpointError(f"{self.folder}: is a link to {self.folder.readlink()}, which is gone") from None
            return Survey(steps, rejected)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error.strerror}") from None
        for path in found:
            why = _why_not(path)
            if why is None:
                steps.append(int(path.name.removeprefix("step_")))
            else:
                rejected[path.name] = why
        return Survey(sorted(steps), rejected)

    def steps(self) -> list[int]:
        """Steps of all published checkpoints, oldest first."""
        return self.survey().steps

    def step_dir(self, step: int) -> Path:
        """Folder of a published checkpoint."""
        return self.folder / f"step_{step:08d}"

    def staging_dir(self, step: int) -> Path:
        """Folder in which a checkpoint is being written."""
        return self.folder / f"step_{step:08d}{UNFINISHED}"

    def begin(self, step: int, needed: int = 0) -> Path:
        """An empty staging folder; what interrupted saves left behind is removed.

        Args:
            step: of the checkpoint.
            needed: bytes that it will take.

        Raises:
            CheckpointError: the disk has less room than that.
        """
        self._clear()
        if not self.folder.is_dir():
            fsio.make_dir(self.folder)
        free = fsio.free_bytes(self.folder)
        if free < needed:
            raise CheckpointError(
                f"the checkpoint needs {needed:,} bytes ({needed / 1e9:.3g} GB) and the disk has {free:,} free "
                f"({free / 1e9:.3g} GB); free some, lower checkpoint.keep_last, or take another disk for run.dir"
            )
        staging = self.staging_dir(step)
        fsio.make_dir(staging)
        return staging

    def publish(self, manifest: Manifest) -> Path:
        """Make the staged checkpoint visible, at once and durably.

        Said again for the same content, because a disk failed after the rename, it makes that durable.
        """
        staging, target = self.staging_dir(manifest.step), self.step_dir(manifest.step)
        fsio.write_file(staging / MANIFEST, [manifest.to_json()])
        fsio.flush_folder(staging)
        if target.exists() or target.is_symlink():  # saved before, under another configuration: it stands
            self._check_same(target, manifest)
            fsio.remove_tree(staging)
            fsio.flush_folder(self.folder)
            return target
        fsio.publish(staging, target)
        return target

    def set_aside(self, step: int) -> Path:
        """Take a damaged checkpoint out of the way without losing what is left of it; its new folder."""
        name = self.step_dir(step).name
        number = sum(1 for _ in self.folder.glob(f"{name}.damaged*"))
        aside = self.folder / f"{name}.damaged{number or ''}"
        fsio.publish(self.step_dir(step), aside)
        return aside

    def abandon(self, step: int) -> None:
        """Remove what a failed save has written."""
        staging = self.staging_dir(step)
        if staging.exists():
            fsio.remove_tree(staging)

    def prune(self, keep_last: int, keep_every: int) -> list[int]:
        """Remove checkpoints that the retention rule does not keep, and staging folders of dead saves.

        Returns:
            the steps removed.
        """
        removed = self.expendable(keep_last, keep_every)
        for step in removed:
            doomed = self.step_dir(step).with_suffix(REMOVED)
            fsio.publish(self.step_dir(step), doomed)  # no half-removed folder under a valid name
            fsio.remove_tree(doomed)
        self._clear()
        return removed

    def expendable(self, keep_last: int, keep_every: int) -> list[int]:
        """Steps that the retention rule does not keep. Only whole checkpoints count for it."""
        steps = self.steps()
        kept = set(steps[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
        return [step for step in steps if step not in kept]

    def _clear(self) -> None:
        for kind in (UNFINISHED, REMOVED):
            for leftover in self.folder.glob(f"step_*{kind}"):
                fsio.remove_tree(leftover)

    def _check_same(self, target: Path, manifest: Manifest) -> None:
        try:
            same = read_manifest(target).to_json() == manifest.to_json()
        except CheckpointError:
            same = False
        if not same:
            raise CheckpointError(f"{target}: exists already; a checkpoint is never overwritten")


def _why_not(path: Path) -> str | None:
    """Why something in a folder of checkpoints is none; None if it is one."""
    if path.name.startswith("step_") and path.name.endswith(UNFINISHED):
        return "was never finished"
    if path.name.startswith("step_") and path.name.endswith(REMOVED):
        return "was being removed"
    if not STEP_DIR.fullmatch(path.name):
        return "is no checkpoint of this program (nothing here is ever chosen by a pointer file)"
    if path.is_symlink():
        return f"is a link to {path.readlink()}; a checkpoint is a folder of its own"
    if not path.is_dir():
        return "is not a folder"
    try:
        (path / MANIFEST).lstat()
    except FileNotFoundError:
        return f"has no {MANIFEST}, so it is not complete"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None
