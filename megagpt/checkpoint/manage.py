"""`megagpt checkpoint list|verify|prune`: what a person does to the checkpoints of a run."""

from __future__ import annotations

import os
from pathlib import Path

from megagpt.checkpoint.manifest import read_manifest, verify_checkpoint
from megagpt.checkpoint.open import CHECKPOINTS
from megagpt.checkpoint.store import DAMAGED, REMOVED, UNFINISHED, CheckpointStore
from megagpt.errors import CheckpointDamaged, CheckpointError
from megagpt.lock import locked_folder


def list_checkpoints(run_dir: Path) -> str:
    """A line for each complete checkpoint of a run: step, size, hash; then what else lies there, and why it is none."""
    store = _store_of(run_dir)
    found = store.survey()
    lines = []
    for step in found.steps:
        try:
            manifest = read_manifest(store.step_dir(step))
        except CheckpointError as error:
            lines.append(f"step {step:>8}  cannot be used: {error}")
            continue
        lines.append(
            f"step {step:>8}  {manifest.n_bytes / 2**20:10,.1f} MiB  {len(manifest.files):>5} files  {manifest.hash}"
        )
    lines = lines or [f"{store.folder}: no complete checkpoint"]
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in found.rejected.items())])


def verify_all(run_dir: Path) -> str:
    """Verify every checkpoint of a run.

    Raises:
        CheckpointError: every damaged file of every checkpoint.
    """
    store = _store_of(run_dir)
    found = store.survey()
    problems: list[str] = []
    for step in found.steps:
        try:
            verify_checkpoint(store.step_dir(step))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    lines = [f"{store.folder}: {len(found.steps)} checkpoints, every file as its manifest says"]
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in found.rejected.items())])


def prune_run(run_dir: Path, *, keep_last: int, keep_every: int, dry_run: bool, damaged: bool = False) -> str:
    """Remove the checkpoints of a run that a retention rule does not keep, and what unfinished saves left.

    The newest checkpoint is verified before any other is removed.

    Args:
        run_dir: the run's folder.
        keep_last: newest complete checkpoints that are kept, at least 1.
        keep_every: every checkpoint whose step is a multiple of this is kept too; 0 for none.
        dry_run: remove nothing, and say what would be.
        damaged: remove what was set aside as damaged, too.

    Raises:
        CheckpointError: a process trains there, the newest checkpoint is damaged, or not all could be removed.
    """
    store = _store_of(run_dir)
    if dry_run:
        return _pruned(store, keep_last, keep_every, dry_run=True, damaged=damaged)
    busy = CheckpointError(f"{run_dir}: a process trains here and removes checkpoints itself; wait for it to end")
    try:
        with locked_folder(run_dir, busy):
            return _pruned(store, keep_last, keep_every, dry_run=False, damaged=damaged)
    except OSError as error:
        raise CheckpointError(f"{store.folder}: nothing was removed: {error}") from None


def _pruned(store: CheckpointStore, keep_last: int, keep_every: int, *, dry_run: bool, damaged: bool) -> str:
    doomed = store.expendable(keep_last, keep_every)
    kept = [step for step in store.steps() if step not in doomed]
    aside = store.leftovers(DAMAGED)
    leftovers = [*store.leftovers(UNFINISHED), *store.leftovers(REMOVED)]
    if kept and (doomed or (damaged and aside)):
        try:
            verify_checkpoint(store.step_dir(kept[-1]))
        except CheckpointDamaged as error:
            raise CheckpointError(f"nothing was removed, because the newest checkpoint is damaged: {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"nothing was removed, because the newest checkpoint is not known: {error}") from None
    sizes = {store.step_dir(step): f"step {step:>8}  {_size(store.step_dir(step))}" for step in doomed}
    sizes |= {path: path.name for path in leftovers}
    if damaged:
        sizes |= {path: f"{path.name}  {_size(path)}" for path in aside}
    failures: list[str] = []
    if not dry_run:
        failures = store.prune(keep_last, keep_every).failures
        failures += store.remove_damaged() if damaged else []
    gone = [line for path, line in sizes.items() if dry_run or not os.path.lexists(path)]
    lines = [f"{'would remove' if dry_run else 'removed'} {line}" for line in gone]
    if not damaged:
        lines += [f"left {path.name}  {_size(path)}: set aside; --damaged removes it" for path in aside]
    lines.append(f"{store.folder}: keeps {', '.join(map(str, kept)) or 'nothing'}")
    if failures:
        raise CheckpointError("\n".join([*lines, *(f"not removed: {told}" for told in failures)]))
    return "\n".join(lines)


def _size(path: Path) -> str:
    """What is in a folder, for a person."""
    if path.is_symlink() or not path.is_dir():
        return "no folder"
    return f"{sum(inside.lstat().st_size for inside in path.rglob('*')) / 2**20:10,.1f} MiB"


def _store_of(run_dir: Path) -> CheckpointStore:
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name the folder of a run")
    return CheckpointStore(folder)
