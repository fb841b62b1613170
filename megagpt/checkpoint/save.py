"""Saving and restoring by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from megagpt.checkpoint import fsio
from megagpt.checkpoint.store import CheckpointStore, FileEntry, Manifest, Removal, read_manifest, verify_file
from megagpt.checkpoint.tensors import RankFile, TensorSlice, rank_file
from megagpt.errors import (
    CheckpointDamaged,
    CheckpointError,
    CheckpointIncomplete,
    CheckpointUnreadable,
    MegaGPTError,
    NoRoom,
    lacks_room,
)
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


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint that was published."""

    manifest: Manifest
    not_removed: tuple[str, ...]
    """Leftovers of other saves that are still there, and why."""
    set_aside: str | None
    """What stood in its way and was no checkpoint."""


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
    return write_checkpoint(store, mesh, lambda: RankFile.of(slices), state, identity).manifest


def write_checkpoint(
    store: CheckpointStore,
    mesh: Mesh,
    own_file: Callable[[], RankFile],
    state: Mapping[str, Any],
    identity: Identity,
) -> Written:
    """As `save_checkpoint`, with the content of this rank's file.

    Nothing that other processes must wait for, or a reader could take for a checkpoint, is there before every rank's
    file is durable. What a failed save has written is removed: its room is free again.

    Raises:
        NoRoom: on all ranks, where a disk or a quota was full.
        CheckpointError: on all ranks, if any of them could not write for another reason.
    """
    step = int(state["step"])
    not_saved = f"{store.staging_dir(step)}: not saved"
    content: list[RankFile] = []

    def prepare() -> int:
        content.append(own_file())
        return content[0].n_bytes

    sizes = _each(mesh, prepare, not_saved)
    begun: list[Path] = []
    try:
        needed = sum(sizes) + _copied_bytes(identity)
        not_removed, staging = _of_main(mesh, lambda: (tuple(store.clear()), store.begin(step, needed)), not_saved)
        begun.append(staging)
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
        set_aside = _of_main(mesh, lambda: (store.make_way(step), store.publish(manifest, staging))[0], not_saved)
    except CheckpointError as error:
        staging = begun[0] if begun else store.staging_dir(step)
        raise type(error)(f"{error}{_cleared(store, mesh, staging)}") from None
    return Written(manifest, not_removed, set_aside)


def read_back(store: CheckpointStore, mesh: Mesh, manifest: Manifest) -> None:
    """Compare a checkpoint that was just published with what was written, as it lies on disk.

    Every rank reads its own file, so that it costs what reading the checkpoint in parallel costs.

    Raises:
        CheckpointError: on all ranks, naming each file that is otherwise, or could not be read.
    """
    step_dir = store.step_dir(manifest.step)

    def read_own() -> None:
        if mesh.is_main and read_manifest(step_dir).to_json() != manifest.to_json():
            raise CheckpointDamaged(f"{step_dir}: its manifest is not the one that was written")
        for name in sorted(manifest.files):
            if name == rank_file(mesh.rank) or (mesh.is_main and not name.endswith(".safetensors")):
                verify_file(step_dir, name, manifest.files[name], from_disk=True)

    _each(mesh, read_own, f"{step_dir}: is not what was written")


def prune_checkpoints(
    store: CheckpointStore, mesh: Mesh, keep_last: int, keep_every: int, verified: Manifest | None = None
) -> None:
    """Remove what the retention rule does not keep; every process waits for it.

    Args:
        store: where.
        mesh: this process's place.
        keep_last: newest checkpoints that are kept.
        keep_every: multiples that are kept.
        verified: the checkpoint that is read back before an older one is removed; None where that is not asked for.

    Raises:
        CheckpointError: on all ranks, if something could not be removed, or was not because `verified` is not whole.
    """
    not_removed = f"{store.folder}: old checkpoints not removed"
    doomed = _of_main(mesh, lambda: store.expendable(keep_last, keep_every), not_removed)
    if doomed and verified is not None:
        try:
            read_back(store, mesh, verified)
        except CheckpointError as error:
            raise CheckpointError(f"{not_removed}, because the new one cannot be relied on: {error}") from None
    found = _of_main(mesh, lambda: store.prune(keep_last, keep_every), not_removed)
    if found.failures:
        raise CheckpointError(f"{not_removed}: {'; '.join(found.failures)}")


def make_room(store: CheckpointStore, mesh: Mesh, keep_last: int, keep_every: int) -> list[int]:
    """Apply the retention rule before a save that it comes after: remove the oldest checkpoint that would go then.

    The newest one always stays, and is verified before.

    Returns:
        the steps removed, the same on every rank; none where the rule keeps all that is there.

    Raises:
        CheckpointError: on all ranks, if the newest is not whole or nothing could be removed.
    """
    not_removed = f"{store.folder}: no room was made"
    early = max(keep_last - 1, 1)
    doomed = _of_main(mesh, lambda: store.expendable(early, keep_every)[:1], not_removed)
    if not doomed:
        return []
    newest = _of_main(mesh, lambda: store.steps()[-1], not_removed)
    try:
        verify_together(store.step_dir(newest), mesh)
    except MegaGPTError as error:
        raise CheckpointError(f"{not_removed}: {error}") from None

    def remove() -> Removal:
        fsio.flush_folder(store.folder)  # the newest one may just have been published, by a save that failed at this
        return store.remove(doomed)

    found = _of_main(mesh, remove, not_removed)
    if found.failures:
        raise CheckpointError(f"{not_removed}: {'; '.join(found.failures)}")
    return found.steps


def _of_main(mesh: Mesh, work: Callable[[], T], otherwise: str) -> T:
    """What the main rank's work on the store gives, on all ranks; where it fails, what was not done.

    Raises:
        CheckpointError: on all ranks; `NoRoom` where the disk was full.
    """
    try:
        found: list[T] = mesh.gather(mesh.together(lambda: [_told(work)()] if mesh.is_main else []))[0]
    except MegaGPTError as error:
        raise (NoRoom if lacks_room(error) else CheckpointError)(f"{otherwise}: {error}") from None
    return found[0]


def _told(work: Callable[[], T]) -> Callable[[], T]:
    """The same, and whatever it raises can be told on all ranks: raised on one alone, the others would wait."""

    def tell() -> T:
        try:
            return work()
        except (OSError, MegaGPTError):
            raise
        except Exception as error:
            raise CheckpointError(repr(error)) from error

    return tell


def _each(mesh: Mesh, work: Callable[[], T], otherwise: str) -> list[T]:
    """What every rank's work gives, in rank order.

    Raises:
        CheckpointError: on all ranks, with what went wrong on each: none waits for one that failed.
    """
    result: list[T] = []
    failure: str | None = None
    full = False
    try:
        result.append(work())
    except (OSError, MegaGPTError) as error:
        failure, full = f"rank {mesh.rank}: {error}", lacks_room(error)
    except Exception as error:  # noqa: BLE001 - it is told on all ranks; raised on one, the others would wait
        failure = f"rank {mesh.rank}: {error!r}"
    reports = mesh.gather((result, failure, full))
    failures = [told for _, told, _ in reports if told]
    if failures:
        kind = NoRoom if any(was_full for *_, was_full in reports) else CheckpointError
        raise kind(f"{otherwise}: {'; '.join(failures)}")
    return [found[0] for found, *_ in reports]


def _cleared(store: CheckpointStore, mesh: Mesh, staging: Path) -> str:
    """Free the room of a save that failed; what to add to its message where that fails too."""
    try:
        mesh.on_main(_told(lambda: store.abandon(staging)))
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

    What one rank finds damaged another one reads as well: a rank may see what lies on the disk otherwise than it is.

    Raises:
        CheckpointDamaged: on all ranks, naming each damaged file: bytes were read, and two ranks found them wrong.
        CheckpointUnreadable: on all ranks, naming rank and file, where any rank could not read one, or ranks read
            different things: that is no reason to give the checkpoint up.
        CheckpointError: it is of another format.
    """
    manifest = _manifest_of_all(step_dir, mesh)
    damaged: list[str] = []
    unreadable: list[str] = []
    for name in sorted(manifest.files)[mesh.rank :: mesh.world_size]:
        try:
            verify_file(step_dir, name, manifest.files[name])
        except CheckpointDamaged:
            damaged.append(name)
        except CheckpointError as error:
            unreadable.append(f"rank {mesh.rank}: {error}")
    found = mesh.gather((damaged, unreadable))
    if any(some for _, some in found):
        raise _unreadable(step_dir, [told for _, some in found for told in some])
    # Each is read again by the rank before the one that found it; one process alone reads it again itself.
    mine = found[(mesh.rank + 1) % mesh.world_size][0]
    reports = mesh.gather([_read_again(step_dir, name, manifest.files[name], mesh) for name in mine])
    doubtful = [told for some in reports for told, is_damaged in some if not is_damaged]
    if doubtful:
        raise _unreadable(step_dir, doubtful)
    problems = [told for some in reports for told, _ in some]
    if problems:
        raise CheckpointDamaged("\n".join(problems) + _otherwise(step_dir))
    return manifest


def _read_again(step_dir: Path, name: str, entry: FileEntry, mesh: Mesh) -> tuple[str, bool]:
    """What a second rank finds in a file that one found damaged, and whether it is damaged."""
    try:
        verify_file(step_dir, name, entry, from_disk=True)
    except CheckpointDamaged as error:
        return str(error), True
    except CheckpointError as error:
        return f"rank {mesh.rank}: {error}", False
    finder = (mesh.rank + 1) % mesh.world_size
    return (
        f"{step_dir / name}: rank {finder} read other bytes than were written, rank {mesh.rank} the right ones",
        False,
    )


def _manifest_of_all(step_dir: Path, mesh: Mesh) -> Manifest:
    """The manifest, read by every rank.

    Raises:
        CheckpointError: as `verify_together`.
    """
    own: Manifest | None = None
    failure: CheckpointError | None = None
    try:
        own = read_manifest(step_dir)
    except CheckpointDamaged as error:
        failure = error
        if mesh.world_size == 1:
            with suppress(CheckpointError):
                own = read_manifest(step_dir)
    except CheckpointError as error:
        failure = error
    reports = mesh.gather((failure, xxhash.xxh3_128_hexdigest(own.to_json()) if own is not None else None))
    for found, _ in reports:
        if found is not None and not isinstance(found, (CheckpointDamaged, CheckpointIncomplete, CheckpointUnreadable)):
            raise found  # whole, and of another format
    telling = [f"rank {rank}: {found}" for rank, (found, _) in enumerate(reports) if found is not None]
    if len({content for _, content in reports}) > 1:
        what = "; ".join(telling) or "its manifest is another one on another rank"
        raise _unreadable(step_dir, [f"{step_dir}: not the same on all ranks: {what}"])
    if own is not None:
        return own
    if all(isinstance(found, CheckpointDamaged) for found, _ in reports):
        raise CheckpointDamaged(f"{reports[0][0]}{_otherwise(step_dir)}")
    raise _unreadable(step_dir, telling)


def _unreadable(step_dir: Path, told: list[str]) -> CheckpointUnreadable:
    return CheckpointUnreadable(
        "\n".join(told) + f"\nNothing was changed. The same command goes on when every rank can read {step_dir}; "
        "to go on from the checkpoint before it, move it to another folder"
    )


def _otherwise(step_dir: Path) -> str:
    return (
        f"\nRemove {step_dir} to go on from the checkpoint before it, or let checkpoint.fall_back=true set it aside "
        "where there is one"
    )
