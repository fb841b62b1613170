"""Saving and restoring by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megagpt.checkpoint import fsio
from megagpt.checkpoint.store import CheckpointStore, FileEntry, Manifest, read_manifest, verify_file
from megagpt.checkpoint.tensors import RankFile, TensorSlice, rank_file
from megagpt.errors import CheckpointError, MegaGPTError
from megagpt.parallel.mesh import Mesh

T = TypeVar("T")


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
    return write_checkpoint(store, mesh, lambda: RankFile.of(slices), state, identity)


def write_checkpoint(
    store: CheckpointStore,
    mesh: Mesh,
    own_file: Callable[[], RankFile],
    state: Mapping[str, Any],
    identity: Identity,
) -> Manifest:
    """As `save_checkpoint`, with the content of this rank's file.

    Nothing that other processes must wait for, or a reader could take for a checkpoint, is there before every rank's
    file is durable. What a failed save has written is removed: its room is free again.
    """
    step = int(state["step"])
    staging = store.staging_dir(step)
    not_saved = f"{staging}: not saved"
    content: list[RankFile] = []

    def prepare() -> int:
        content.append(own_file())
        return content[0].n_bytes

    sizes = _each(mesh, prepare, not_saved)
    try:
        _on_main(mesh, lambda: store.begin(step, sum(sizes) + _copied_bytes(identity)), not_saved)
        written = _each(mesh, lambda: _write_own_files(staging, mesh, content[0], identity), not_saved)
        manifest = Manifest(
            step=step,
            files={name: entry for some in written for name, entry in some.items()},
            state=dict(state),
            config=identity.config,
            data_fingerprint=identity.data_fingerprint,
            tokenizer=identity.tokenizer,
            versions=identity.versions,
        )
        _on_main(mesh, lambda: store.publish(manifest), not_saved)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_cleared(store, mesh, step)}") from None
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


def _each(mesh: Mesh, work: Callable[[], T], otherwise: str) -> list[T]:
    """What every rank's work gives, in rank order.

    Raises:
        CheckpointError: on all ranks, with what went wrong on each: none waits for one that failed.
    """
    result: list[T] = []
    failure: str | None = None
    try:
        result.append(work())
    except (OSError, MegaGPTError) as error:
        failure = f"rank {mesh.rank}: {error}"
    except Exception as error:  # noqa: BLE001 - it is told on all ranks; raised on one, the others would wait
        failure = f"rank {mesh.rank}: {error!r}"
    reports = mesh.gather((result, failure))
    failures = [told for _, told in reports if told]
    if failures:
        raise CheckpointError(f"{otherwise}: {'; '.join(failures)}")
    return [found[0] for found, _ in reports]


def _cleared(store: CheckpointStore, mesh: Mesh, step: int) -> str:
    """Free the room of a save that failed; what to add to its message where that fails too."""
    try:
        mesh.on_main(lambda: store.abandon(step))
    except MegaGPTError as error:
        return f"; what it has written is still there: {error}"
    return ""


def _copied_bytes(identity: Identity) -> int:
    return sum(path.stat().st_size for path in identity.tokenizer_files)


def _write_own_files(staging: Path, mesh: Mesh, content: RankFile, identity: Identity) -> dict[str, FileEntry]:
    name = rank_file(mesh.rank)
    files = {name: FileEntry(*fsio.write_file(staging / name, content.chunks()))}
    if mesh.is_main:
        for path in identity.tokenizer_files:
            files[path.name] = FileEntry(*fsio.write_file(staging / path.name, [path.read_bytes()]))
    return files


def verify_together(step_dir: Path, mesh: Mesh) -> Manifest:
    """Check every file of a checkpoint against its manifest, the files shared out over the ranks.

    Raises:
        CheckpointError: on all ranks, naming each damaged file.
    """
    otherwise = f"\nRemove {step_dir} to go on from the checkpoint before it"

    def readable() -> Manifest:
        try:
            return read_manifest(step_dir)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{otherwise}") from None

    manifest = mesh.together(readable)
    problem: str | None = None
    for name in sorted(manifest.files)[mesh.rank :: mesh.world_size]:
        try:
            verify_file(step_dir, name, manifest.files[name])
        except CheckpointError as error:
            problem = str(error)
    problems = [str(found) for found in mesh.gather(problem) if found]
    if problems:
        raise CheckpointError("\n".join(problems) + otherwise)
    return manifest
