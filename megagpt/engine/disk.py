"""Optimizer state on local disks under ZeRO-3: DeepSpeed's swapper on a file of our own.

DeepSpeed's own disk access (its op `async_io`) counts finished requests and looks at no result: a read into memory that
is not aligned, or a write to a full disk, does nothing and passes for done. Here every result is looked at, nothing has
to be aligned, and nothing has to be compiled. What DeepSpeed moves, and when, stays DeepSpeed's.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper
from torch import Tensor

from megagpt.errors import ConfigError, MegaGPTError

THREADS = 8
BLOCK = 16 * 2**20
"""Bytes that a thread reads or writes at once."""
PLACES = 4
"""Values an element on disk: weight, both Adam moments, gradient."""


class ScratchFile:
    """What DeepSpeed's swapper asks of an `aio_handle`, in one file without a name.

    The file's room is given back when the process ends, however it ends, and no other process can meet it. DeepSpeed's
    paths are names of extents in it.

    Args:
        folder: on the disk to use.

    Raises:
        ConfigError: no file can be made there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            raise ConfigError(
                f"parallel.nvme_dir: {folder}: {error.strerror}; name a folder that exists on every host's local disk "
                "and that you may write to"
            ) from None
        weakref.finalize(self, os.close, self._descriptor)
        self._pool = ThreadPoolExecutor(THREADS)
        self._extents: dict[str, tuple[int, int]] = {}
        self._end = 0
        self._room = 0
        self._buffers: set[int] = set()
        self._running: list[Future[None]] = []
        self._touched: set[str] = set()
        self._requests = 0
        self._wrote = False

    def reserve(self, n_bytes: int) -> None:
        """Have room for so many bytes, so that a full disk ends a run at its start.

        Raises:
            MegaGPTError: the disk is too full.
        """
        if n_bytes <= self._room:
            return
        try:
            os.posix_fallocate(self._descriptor, self._room, n_bytes - self._room)
        except OSError as error:
            raise MegaGPTError(
                f"parallel.nvme_dir: {self._folder}: no room for the {n_bytes / 1e9:.3g} GB of this process's "
                f"optimizer state ({error.strerror}); free some, use another disk, or more processes"
            ) from None
        self._room = n_bytes

    def view(self, path: str, numel: int) -> Tensor:
        """(numel,) fp32: what is on disk, read when it is looked at. Good until the next write."""
        start, _ = self._extents[path]
        mapped = mmap.mmap(self._descriptor, 4 * numel, access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(mapped, dtype=torch.float32)

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        """(numel,) A buffer that values pass through, page-locked where a GPU copies from it."""
        buffer = torch.empty(numel, dtype=example.dtype, pin_memory=torch.cuda.is_available())
        self._buffers.add(buffer.untyped_storage().data_ptr())
        return buffer

    def free_cpu_locked_tensor(self, buffer: Tensor) -> None:
        """Forget a buffer."""
        self._buffers.discard(buffer.untyped_storage().data_ptr())

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the buffers."""
        return tensor.untyped_storage().data_ptr() in self._buffers

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        """Begin to read into a buffer."""
        self._begin(os.preadv, buffer, path, offset)
        return 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        """Begin to write a buffer, which must stay as it is until `wait`."""
        if path not in self._extents:
            size = -(-(offset + buffer.nbytes) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self.reserve(self._end + size)
            self._extents[path] = (self._end, size)
            self._end += size
        self._begin(os.pwritev, buffer, path, offset)
        self._wrote = True
        return 0

    def wait(self) -> int:
        """Wait for all that was begun.

        Returns:
            How many requests that were.

        Raises:
            OSError: one of them failed.
        """
        self._finish()
        if self._wrote:
            os.fdatasync(self._descriptor)  # some errors of a disk are told here alone
            self._wrote = False
        n_requests, self._requests = self._requests, 0
        return n_requests

    def _begin(self, move: Any, buffer: Tensor, path: str, offset: int) -> None:
        if path in self._touched:  # after a step that was skipped, DeepSpeed writes a gradient twice before it waits
            self._finish()
        start, size = self._extents[path]
        if offset + buffer.nbytes > size:
            raise ValueError(f"{path} holds {size} bytes, not {offset + buffer.nbytes}")
        # A thread sees the bytes alone: torch would keep what it knows of a tensor that changes its memory meanwhile.
        held = buffer.detach().view(torch.uint8).numpy().data
        for begin in range(0, len(held), BLOCK):
            part = held[begin : begin + BLOCK]
            self._running.append(self._pool.submit(_whole, move, self._descriptor, part, start + offset + begin))
        self._touched.add(path)
        self._requests += 1

    def _finish(self) -> None:
        running, self._running = self._running, []
        self._touched.clear()
        for one in running:
            one.result()


def _whole(move: Any, file: int, part: memoryview, at: int) -> None:
    """Read or write all of it: the system may do less at a time."""
    while part:
        moved = move(file, [part], at)
        if moved == 0:
            raise OSError(f"end of the file at byte {at}, {len(part)} bytes early")
        part, at = part[moved:], at + moved


@contextmanager
def swapping_through(scratch: ScratchFile | None) -> Iterator[None]:
    """Let the optimizer that DeepSpeed makes meanwhile swap through our file.

    Needed until tests/distributed/test_disk.py shows that DeepSpeed's own access reads and writes or raises.
    """
    if scratch is None:
        yield
        return
    theirs = partitioned_optimizer_swapper.AsyncIOBuilder
    ours = SimpleNamespace(load=lambda: SimpleNamespace(aio_handle=lambda **_: scratch))
    partitioned_optimizer_swapper.AsyncIOBuilder = lambda: ours
    try:
        yield
    finally:
        partitioned_optimizer_swapper.AsyncIOBuilder = theirs


def reserve_for(optimizer: Any, scratch: ScratchFile) -> None:
    """Have room for all that an optimizer will ever swap out.

    Raises:
        MegaGPTError: the disk is too full.
    """
    groups = range(len(optimizer.fp16_groups))
    on_disk = sum(int(optimizer.fp16_partitioned_groups_flat_numel[i]) for i in groups if is_on_disk(optimizer, i))
    scratch.reserve(int(PLACES * 4 * on_disk * 1.01))  # extents are whole pages


def is_on_disk(optimizer: Any, group: int) -> bool:
    """Whether a group of ZeRO-3's (its parameters are updated together) lives on disk: those of 1 MiB and more."""
    return bool(getattr(optimizer, "swap_optimizer", False) and optimizer._swappable_optimizer_subgroup(group))


@contextmanager
def in_memory(optimizer: Any, group: int) -> Iterator[None]:
    """Have a group's weights and moments in memory; then write them, and what was added, to disk again."""
    if not is_on_disk(optimizer, group):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    optimizer._optimizer_states_and_gradient_swap_out(group)


def stored(optimizer: Any, group: int, kind: str | None) -> Tensor:
    """(numel of the group,) fp32 values on disk: the weight, or the named state of the optimizer."""
    swapper = optimizer.optimizer_swapper
    name = swapper.parameter_id(optimizer.fp32_partitioned_groups_flat[group])
    path = Path(swapper.swap_folder) / f"{name if kind is None else f'{kind}-{name}'}.tensor.swp"
    scratch: ScratchFile = swapper.aio_handle
    return scratch.view(str(path), int(optimizer.fp16_partitioned_groups_flat_numel[group]))
