"""A checkpoint written by one process without a process group: resharded, or imported."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from megagpt.checkpoint import fsio
from megagpt.checkpoint.open import CHECKPOINTS
from megagpt.checkpoint.store import CheckpointStore, FileEntry, Manifest, verify_file
from megagpt.errors import CheckpointError

Writer = Callable[[Path], tuple[int, str]]
"""Writes one new file; (bytes, xxh3-128 in hex) taken from memory."""


def new_store(run_dir: Path) -> CheckpointStore:
    """The store of a run that has no checkpoint yet.

    Raises:
        CheckpointError: it has.
    """
    store = CheckpointStore(run_dir / CHECKPOINTS)
    if store.steps():
        raise CheckpointError(f"{store.folder} holds checkpoints already; name another folder")
    return store


def publish_alone(
    store: CheckpointStore,
    step: int,
    writers: Mapping[str, Writer],
    describe: Callable[[Mapping[str, FileEntry]], Manifest],
    n_bytes: int,
    beside: Mapping[str, bytes],
) -> Manifest:
    """Write a checkpoint's files one after the other, read each again, and make all of it visible by one rename.

    A process that is killed at any moment leaves no checkpoint, and to do it again works, or all that belongs to it.

    Args:
        store: where.
        step: of the checkpoint.
        writers: file name -> what writes it.
        describe: (file name -> size and checksum) -> the manifest.
        n_bytes: what the files will take, roughly.
        beside: name -> content of the files that the run's folder holds beside its checkpoints. They are durable
            before the checkpoint can be seen.

    Raises:
        CheckpointError: it does not fit, could not be written, or reads otherwise than it was written; nothing was
            published, and what was written of the checkpoint is removed.
    """
    staging = store.staging_dir(step)
    try:
        staging = store.begin(step)
        free = shutil.disk_usage(staging).free
        if free < n_bytes:
            raise CheckpointError(
                f"{staging}: needs {n_bytes / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB; "
                "free some, or name a folder on another disk"
            )
        files = {name: FileEntry(*write(staging / name)) for name, write in writers.items()}
        for name, entry in files.items():
            verify_file(staging, name, entry)
        manifest = describe(files)
        for name, content in beside.items():
            fsio.replace_file(store.folder.parent / name, content)
        store.publish(manifest, staging)
    except (OSError, CheckpointError) as error:
        with suppress(OSError):
            store.abandon(staging)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{staging}: not written: {error}") from None
    return manifest


def copied(source: Path) -> Writer:
    """Writes what another file holds."""
    return lambda path: fsio.write_file(path, [source.read_bytes()])
