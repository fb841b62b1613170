"""`megagpt checkpoint list|verify|prune`: what a person does to the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

from megagpt.checkpoint.manifest import read_manifest, verify_checkpoint
from megagpt.checkpoint.open import CHECKPOINTS
from megagpt.checkpoint.store import CheckpointStore
from megagpt.errors import CheckpointError
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


def prune_run(run_dir: Path, *, keep_last: int, keep_every: int, dry_run: bool) -> str:
    """Remove the checkpoints of a run that a retention rule does not keep, and what unfinished saves left.

    The newest checkpoint is verified before any other is removed.

    Args:
        run_dir: the run's folder.
        keep_last: newest complete checkpoints that are kept, at least 1.
        keep_every: every checkpoint whose step is a multiple of this is kept too; 0 for none.
        dry_run: remove nothing, and say what would be.

    Raises:
        CheckpointError: a process trains there, or the newest checkpoint is damaged.
    """
    store = _store_of(run_dir)
    if dry_run:
        return _pruned(store, keep_last, keep_every, dry_run=True)
    busy = CheckpointError(f"{run_dir}: a process trains here and removes checkpoints itself; wait for it to end")
    with locked_folder(run_dir, busy):
        return _pruned(store, keep_last, keep_every, dry_run=False)


def _pruned(store: CheckpointStore, keep_last: int, keep_every: int, *, dry_run: bool) -> str:
    removed = store.expendable(keep_last, keep_every)
    sizes = {step: _size(store.step_dir(step)) for step in removed}
    kept = [step for step in store.steps() if step not in sizes]
    if removed:
        try:
            verify_checkpoint(store.step_dir(kept[-1]))
        except CheckpointError as error:
            raise CheckpointError(f"nothing was removed, because the newest checkpoint is damaged: {error}") from None
    leftovers = [name for name in store.survey().rejected if name.startswith("step_") and "." in name]
    if not dry_run:
        try:
            store.prune(keep_last, keep_every)
        except OSError as error:
            raise CheckpointError(f"{store.folder}: not all was removed: {error}") from None
    verb = "would remove" if dry_run else "removed"
    lines = [f"{verb} step {step:>8}  {size / 2**20:10,.1f} MiB" for step, size in sizes.items()]
    lines += [f"{verb} {name}" for name in leftovers]
    return "\n".join([*lines, f"{store.folder}: keeps {', '.join(map(str, kept)) or 'nothing'}"])


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir())


def _store_of(run_dir: Path) -> CheckpointStore:
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name the folder of a run")
    return CheckpointStore(folder)
