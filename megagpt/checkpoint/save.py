"""Saving and restoring by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoint import fsio
from megagpt.checkpoint.store import CheckpointStore, FileEntry, Manifest, read_manifest, verify_file
from megagpt.checkpoint.tensors import TensorSlice, write_slices
from megagpt.errors import CheckpointError, MegaGPTError
from megagpt.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Identity:
    """What a checkpoint says about the run it belongs to."""

    config: Mapping[str, Any]
    data_fingerprint: str | None
    tokenizer: Mapping[str, Any] | None
    tokenizer_files: tuple[Path, ...]
    versions: Mapping[str, str]


def save_checkpoint(
    store: CheckpointStore,
    mesh: Mesh,
    slices: Iterable[TensorSlice],
    state: Mapping[str, Any],
    identity: Identity,
) -> Manifest:
    """Write one checkpoint: every rank its slices, then the main rank the manifest, then one rename.

    Raises:
        CheckpointError: on all ranks, if any of them could not write; nothing was published.
    """
    step = int(state["step"])
    staging = store.staging_dir(step)
    _on_main(mesh, lambda: store.begin(step), f"{staging}: not saved")
    files, failure = _write_own_files(staging, mesh, slices, identity)
    reports = mesh.gather((files, failure))
    failures = [report[1] for report in reports if report[1]]
    if failures:
        raise CheckpointError(f"{staging}: not saved: {'; '.join(failures)}")
    manifest = Manifest(
        step=step,
        files={name: entry for report in reports for name, entry in report[0].items()},
        state=dict(state),
        config=identity.config,
        data_fingerprint=identity.data_fingerprint,
        tokenizer=identity.tokenizer,
        versions=identity.versions,
    )
    _on_main(mesh, lambda: store.publish(manifest), f"{staging}: not saved")
    return manifest


def prune_checkpoints(store: CheckpointStore, mesh: Mesh, keep_last: int, keep_every: int) -> None:
    """Remove what the retention rule does not keep; every process waits for it.

    Raises:
        CheckpointError: on all ranks, if something could not be removed.
    """
    _on_main(mesh, lambda: store.prune(keep_last, keep_every), f"{store.folder}: old checkpoints not removed")


def _on_main(mesh: Mesh, work: Callable[[], object], otherwise: str) -> None:
    """Let the main rank do something to the store, and say what was not done where it cannot."""
    try:
        mesh.on_main(work)
    except MegaGPTError as error:
        raise CheckpointError(f"{otherwise}: {error}") from None


def _write_own_files(
    staging: Path, mesh: Mesh, slices: Iterable[TensorSlice], identity: Identity
) -> tuple[dict[str, FileEntry], str | None]:
    """This rank's files, or why they could not be written: the other ranks must hear of it."""
    files: dict[str, FileEntry] = {}
    try:
        name = f"rank_{mesh.rank:05d}.safetensors"
        files[name] = FileEntry(*write_slices(staging / name, slices))
        if mesh.is_main:
            for path in identity.tokenizer_files:
                files[path.name] = FileEntry(*fsio.write_file(staging / path.name, [path.read_bytes()]))
    except OSError as error:
        return files, f"rank {mesh.rank}: {error}"
    return files, None


def verify_together(step_dir: Path, mesh: Mesh) -> Manifest:
    """Check every file of a checkpoint against its manifest, the files shared out over the ranks.

    Raises:
        CheckpointError: on all ranks, naming each damaged file.
    """
    manifest = mesh.together(lambda: read_manifest(step_dir))
    problem: str | None = None
    for name in sorted(manifest.files)[mesh.rank :: mesh.world_size]:
        try:
            verify_file(step_dir, name, manifest.files[name])
        except CheckpointError as error:
            problem = str(error)
    problems = [str(found) for found in mesh.gather(problem) if found]
    if problems:
        raise CheckpointError("\n".join(problems) + f"\nRemove {step_dir} to go on from the checkpoint before it")
    return manifest
