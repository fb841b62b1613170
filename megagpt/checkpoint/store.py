"""A folder of checkpoints in which every one that can be seen is whole.

    step_00000100.tmp/   being written: each rank's file, then manifest.json, each fsynced
    step_00000100/       published by one rename; valid by its manifest, never by a pointer file
    step_00000100.damaged/   set aside: nothing of it is lost, and nothing takes it for a checkpoint
    step_00000100.removed/   being removed

Where such a name is taken by something that cannot be removed, a number stands before its ending. What else lies there
is no checkpoint: `survey` names it and says why.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
from megagpt.errors import CheckpointError, CheckpointUnreadable, NoRoom

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
DAMAGED = ".damaged"
_KINDS = {
    UNFINISHED: "was never finished",
    REMOVED: "was being removed",
    DAMAGED: "was set aside; `megagpt checkpoint prune --damaged` removes it",
}
"""Ending of a name in a folder of checkpoints -> what it says."""
_ENDING = re.compile(r"step_.*?(\.tmp|\.removed|\.damaged)\d*", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Survey:
    """What lies in a folder of checkpoints."""

    steps: list[int]
    """Of the published checkpoints, oldest first."""
    rejected: Mapping[str, str]
    """Name -> why it is no checkpoint, of everything else."""
    unreadable: Mapping[int, str] = field(default_factory=dict)
    """Step -> why it cannot be told whether there is a checkpoint; in `rejected` too."""

    def check_newest_readable(self, folder: Path) -> None:
        """See that nothing newer than the newest checkpoint may be one.

        Raises:
            CheckpointUnreadable: naming it.
        """
        newest = self.steps[-1] if self.steps else -1
        for step, why in sorted(self.unreadable.items(), reverse=True):
            if step > newest:
                instead = f"go on from step {newest}" if self.steps else "do without it"
                raise CheckpointUnreadable(
                    f"{folder / _name(step)}: {why}, and it is newer than any checkpoint that can be read. Mend that, "
                    f"or move it to another folder to {instead}"
                )

    @property
    def is_fresh(self) -> bool:
        """Nothing was ever saved here: at most a first save was begun and not finished."""
        return not self.steps and all(name.endswith(UNFINISHED) for name in self.rejected)

    def told(self) -> str:
        """What was rejected, for a person; nothing where nothing was."""
        return "; ".join(f"{name} {why}" for name, why in self.rejected.items())


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed, and what is still there."""

    steps: list[int]
    """That are no checkpoints any more."""
    failures: list[str]
    """What could not be removed, and why."""


class CheckpointStore:
    """The checkpoints of one run. One process at a time changes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def survey(self) -> Survey:
        """Everything that lies here.

        Raises:
            CheckpointError: the folder is none.
            CheckpointUnreadable: it cannot be read, or is a link to what is gone.
        """
        steps: list[int] = []
        rejected: dict[str, str] = {}
        unreadable: dict[int, str] = {}
        try:
            found = sorted(self.folder.iterdir())
        except FileNotFoundError:
            if self.folder.is_symlink():
                gone = f"{self.folder}: is a link to {self.folder.readlink()}, which is gone; is its disk mounted?"
                raise CheckpointUnreadable(gone) from None
            return Survey(steps, rejected)
        except NotADirectoryError as error:
            raise CheckpointError(f"{self.folder}: cannot be read: {error.strerror}") from None
        except OSError as error:
            raise CheckpointUnreadable(f"{self.folder}: cannot be read: {error.strerror}") from None
        for path in found:
            try:
                why = _why_not(path)
            except OSError as error:
                why = f"cannot be read: {error.strerror}"
                unreadable[int(path.name.removeprefix("step_"))] = why
            if why is None:
                steps.append(int(path.name.removeprefix("step_")))
            else:
                rejected[path.name] = why
        return Survey(sorted(steps), rejected, unreadable)

    def steps(self) -> list[int]:
        """Steps of all published checkpoints, oldest first."""
        return self.survey().steps

    def step_dir(self, step: int) -> Path:
        """Folder of a published checkpoint."""
        return self.folder / _name(step)

    def staging_dir(self, step: int) -> Path:
        """Folder in which a checkpoint is being written, unless that name was taken: `begin` says it."""
        return self.folder / f"{_name(step)}{UNFINISHED}"

    def clear(self) -> list[str]:
        """Remove what interrupted saves and removals left behind; what could not be, and why."""
        found = self.leftovers(REMOVED)
        if found:
            try:
                fsio.flush_folder(self.folder)  # else the name of a checkpoint could be back without what was in it
            except OSError as error:
                return [f"{', '.join(map(str, found))}: {error.strerror}", *self._remove(self.leftovers(UNFINISHED))]
        return self._remove([*self.leftovers(UNFINISHED), *found])

    def leftovers(self, kind: str) -> list[Path]:
        """What lies here under one of the endings `UNFINISHED`, `REMOVED` and `DAMAGED`."""
        return sorted(path for path in self.folder.glob("step_*") if _kind_of(path.name) == kind)

    def begin(self, step: int, needed: int = 0) -> Path:
        """An empty staging folder; what interrupted saves left behind is removed, as far as it can be.

        Args:
            step: of the checkpoint.
            needed: bytes that it will take.

        Raises:
            NoRoom: the disk has less room than that.
        """
        self.clear()
        if not self.folder.is_dir():
            fsio.make_dir(self.folder)
        free = fsio.free_bytes(self.folder)
        if free < needed:
            raise NoRoom(
                f"the checkpoint needs {needed:,} bytes ({needed / 1e9:.3g} GB) and the disk has {free:,} free "
                f"({free / 1e9:.3g} GB); free some, lower checkpoint.keep_last, or take another disk for run.dir"
            )
        staging = self._unused(step, UNFINISHED)
        fsio.make_dir(staging)
        return staging

    def publish(self, manifest: Manifest, staging: Path | None = None) -> Path:
        """Make the staged checkpoint visible, at once and durably.

        Said again for the same content, because a disk failed after the rename, it makes that durable.

        Args:
            manifest: of the checkpoint.
            staging: what `begin` gave, where it is not `staging_dir`.

        Raises:
            CheckpointError: there is a checkpoint of the step already, with other content.
        """
        staging, target = staging or self.staging_dir(manifest.step), self.step_dir(manifest.step)
        fsio.write_file(staging / MANIFEST, [manifest.to_json()])
        fsio.flush_folder(staging)
        if target.exists() or target.is_symlink():  # saved before, under another configuration: it stands
            self._check_same(target, manifest)
            fsio.remove_tree(staging)
            fsio.flush_folder(self.folder)
            return target
        fsio.publish(staging, target)
        return target

    def make_way(self, step: int) -> str | None:
        """Set aside what stands under a step's name and is no checkpoint, so that the step can be published.

        Returns:
            what was done, for a person; None where nothing was in the way.
        """
        target = self.step_dir(step)
        if not (target.exists() or target.is_symlink()):
            return None
        why = _why_not(target)
        if why is None:
            return None
        return f"{target}: {why}; it is {self.set_aside(step).name} now"

    def set_aside(self, step: int) -> Path:
        """Take a damaged checkpoint out of the way without losing what is left of it; its new folder."""
        aside = self._unused(step, DAMAGED)
        fsio.publish(self.step_dir(step), aside)
        return aside

    def abandon(self, staging: Path) -> None:
        """Remove what a failed save has written."""
        if staging.exists():
            fsio.remove_tree(staging)

    def prune(self, keep_last: int, keep_every: int) -> Removal:
        """Remove checkpoints that the retention rule does not keep, and staging folders of dead saves.

        That the newest is whole is for the caller to see before. What cannot be removed does not keep the rest.
        """
        found = self.remove(self.expendable(keep_last, keep_every))
        if found.failures:  # what a rename has not made durable must not be emptied: it may be back after a power cut
            return found
        return Removal(found.steps, self.clear())

    def remove(self, steps: Iterable[int]) -> Removal:
        """Remove checkpoints."""
        removed: list[int] = []
        failures: list[str] = []
        for step in steps:
            doomed = self._unused(step, REMOVED)
            try:
                fsio.publish(self.step_dir(step), doomed)  # no half-removed folder under a valid name
            except OSError as error:
                failures.append(_told(self.step_dir(step), error))
                continue
            removed.append(step)
            failures += self._remove([doomed])
        return Removal(removed, failures)

    def remove_damaged(self) -> list[str]:
        """Remove what was set aside; what could not be, and why."""
        return self._remove(self.leftovers(DAMAGED))

    def expendable(self, keep_last: int, keep_every: int) -> list[int]:
        """Steps that the retention rule does not keep.

        Every checkpoint counts that a save has published; whether the newest is still as it was written is for the
        caller to see before another one is removed.
        """
        steps = self.steps()
        kept = set(steps[-keep_last:]) | {step for step in steps if keep_every and step % keep_every == 0}
        return [step for step in steps if step not in kept]

    def _unused(self, step: int, kind: str) -> Path:
        """A name of that ending which nothing has: a folder that cannot be removed keeps its own."""
        numbers = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
        paths = (self.folder / f"{_name(step)}{number}{kind}" for number in numbers)
        return next(path for path in paths if not os.path.lexists(path))

    def _remove(self, paths: Iterable[Path]) -> list[str]:
        failures = []
        for path in paths:
            try:
                fsio.remove_tree(path)
            except OSError as error:
                failures.append(_told(path, error))
        return failures

    def _check_same(self, target: Path, manifest: Manifest) -> None:
        try:
            same = read_manifest(target).to_json() == manifest.to_json()
        except CheckpointError:
            same = False
        if not same:
            raise CheckpointError(
                f"{target}: exists already, with other content; a checkpoint is never overwritten. Move it to another "
                "folder, and the save is tried again"
            )


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _told(path: Path, error: OSError) -> str:
    """A folder that is not gone, and what of it could not be removed."""
    inside = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
    return f"{path}: {error.strerror}{inside}"


def _kind_of(name: str) -> str | None:
    """Which of the endings a name has; also one with a number behind it, as older versions gave."""
    found = _ENDING.fullmatch(name)
    return found[1] if found else None


def _why_not(path: Path) -> str | None:
    """Why something in a folder of checkpoints is none; None if it is one.

    Raises:
        OSError: it has a checkpoint's name, and cannot be looked into.
    """
    kind = _kind_of(path.name)
    if kind is not None:
        return _KINDS[kind]
    if not STEP_DIR.fullmatch(path.name):
        return "is no checkpoint of this program (nothing here is ever chosen by a pointer file)"
    if path.is_symlink():
        return f"is a link to {path.readlink()}; a checkpoint is a folder of its own"
    if not stat.S_ISDIR(path.lstat().st_mode):
        return "is not a folder"
    try:
        (path / MANIFEST).lstat()
    except FileNotFoundError:
        path.lstat()  # it has just been removed or renamed otherwise
        return f"has no {MANIFEST}, so it is not complete"
    return None
