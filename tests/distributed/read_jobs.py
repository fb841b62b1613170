"""What each of several ranks does in the tests of reading checkpoints that one of them sees otherwise."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path
from typing import BinaryIO
from unittest.mock import patch

from megagpt.checkpoint import fsio
from megagpt.checkpoint.save import verify_together
from megagpt.checkpoint.store import CheckpointStore
from megagpt.errors import MegaGPTError
from tests.checkpoint.small_saves import State, Told, saver
from tests.distributed.save_jobs import join

_open = fsio.open_regular


def without_the_mount(path: Path) -> BinaryIO:
    """Of a host on which the checkpoints' disk is not mounted."""
    if "checkpoints" in path.parts:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return _open(path)


def with_an_error(path: Path) -> BinaryIO:
    """Of a disk that gives some files, and not the tensors."""
    if path.suffix == ".safetensors":
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
    return _open(path)


def with_a_flipped_bit(path: Path) -> BinaryIO:
    """Of a host whose memory, or way to the disk, is not to be trusted."""
    content = bytearray(_open(path).read())
    content[len(content) // 2] ^= 1
    return Held(content) if path.suffix == ".safetensors" else _open(path)


def with_another_manifest(path: Path) -> BinaryIO:
    """The same, of the manifest alone."""
    content = _open(path).read()
    return _open(path) if path.suffix == ".safetensors" else io.BytesIO(content.replace(b"data", b"dbta"))


class Held(io.BytesIO):
    """A file whose number is that of the null device."""

    def fileno(self) -> int:
        return os.open(os.devnull, os.O_RDONLY)


SIGHTS = {
    "ENOENT": without_the_mount,
    "EIO": with_an_error,
    "flipped bit": with_a_flipped_bit,
    "another manifest": with_another_manifest,
}


def train_seeing(words: list[str], sight: str, seeing: int) -> int:
    """Train, one rank seeing checkpoints otherwise from its start on."""
    from megagpt.train.run import main

    if int(os.environ["RANK"]) == seeing:
        fsio.open_regular = SIGHTS[sight]
    return main(words, os.environ)


def verify_in_every_way(folder: Path) -> None:
    """Verify one checkpoint as it is, then as each rank sees it otherwise, then damaged for all; write what came."""
    mesh = join()
    store = CheckpointStore(folder)
    with saver(store, State(10, mesh), Told(), asynchronous=False) as by:
        by.save({"step": 10})
    told = {"whole": outcome(store, mesh)}
    for sight, look in SIGHTS.items():
        for seeing in range(mesh.world_size):
            with patch.object(fsio, "open_regular", look if mesh.rank == seeing else _open):
                told[f"{sight} {seeing}"] = outcome(store, mesh)
    mesh.barrier()
    if mesh.is_main:
        damaged = store.step_dir(10) / "rank_00001.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    mesh.barrier()
    told["damaged"] = outcome(store, mesh)
    mesh.barrier()
    if mesh.is_main:
        (store.step_dir(10) / "manifest.json").write_bytes(b"{}")
    mesh.barrier()
    told["damaged manifest"] = outcome(store, mesh)
    (folder.parent / f"told_{mesh.rank}.json").write_text(json.dumps(told))
    mesh.barrier()


def outcome(store: CheckpointStore, mesh) -> list[str]:
    try:
        verify_together(store.step_dir(10), mesh)
    except MegaGPTError as error:
        return [type(error).__name__, str(error), str(error.exit_code)]
    return ["whole", "", "0"]
