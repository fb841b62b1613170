"""Bytes of tensors that are alive in this process, and their peak, counted by their storages.

It counts what tensors hold, on any device: no allocator's slack, nothing that a kernel or a collective allocates for
itself inside. On a GPU `torch.cuda.max_memory_allocated` counts those too.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megagpt.engine.engine import Engine
from megagpt.engine.slices import state_tensors
from megagpt.model.batch import TokenBatch
from megagpt.model.offload import held_on_host


@dataclass(frozen=True, slots=True)
class MeasuredMemory:
    """Tensors of one process over one optimizer step."""

    peak_bytes: int
    """Most that were alive at once, without those on the host."""
    parts: dict[str, int]
    """The peak by kind: weights, optimizer, gradients, buckets, and `other`: activations, logits, what is temporary."""
    host_bytes: int
    """Most bytes of offloaded activations at once."""


def measure_step(engine: Engine, micro_batches: Sequence[TokenBatch], lr: float) -> MeasuredMemory:
    """Train one step and count the tensors of this process meanwhile. Not the first step: the optimizer is lazy."""
    optimizer, model = engine.optimizer, engine.model
    with TensorAccounting(lambda: state_tensors(optimizer, model)) as accounting:
        engine.train_step(micro_batches, lr)
    return MeasuredMemory(accounting.peak_bytes, accounting.peak_parts, accounting.peak_host_bytes)


class TensorAccounting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every storage is counted from its birth to its death.

    Storages that are alive when it is entered are found and counted as well, DeepSpeed's flat buffers among them. What
    `offload_activations` keeps on the host is counted by itself: where the device is the CPU, it only stands for it.

    Args:
        named: asked at every new peak for the tensors of each kind that are alive then, such as gradients; kinds that
            come first win where they share a storage.
    """

    def __init__(self, named: Callable[[], Mapping[str, Iterable[Tensor]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._named = named
        self._alive: dict[int, tuple[int, bool]] = {}  # storage -> (bytes, on the host)
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live_bytes = 0
        self.host_bytes = 0
        self.peak_bytes = 0
        """Most bytes that were alive at once, without those on the host."""
        self.peak_host_bytes = 0
        self.peak_parts: dict[str, int] = {}
        """The peak by kind; `other` is what `named` did not name."""

    def __enter__(self) -> Self:
        """Count what is there already."""
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):  # isinstance would ask lazy objects of other libraries to load
                self._count(thing, host=False)
                if thing.is_leaf and thing.grad is not None:
                    self._count(thing.grad, host=False)
        self._note_peak()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        for thing in tree_iter(made):
            if isinstance(thing, Tensor):
                self._count(thing, host=held_on_host())
        if self.live_bytes > self.peak_bytes:
            self._note_peak()
        self.peak_host_bytes = max(self.peak_host_bytes, self.host_bytes)
        return made

    def _count(self, tensor: Tensor, *, host: bool) -> None:
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        known = self._alive.get(key)
        if known is not None:
            if known[0] != size:  # resized in place
                self._add(size - known[0], host=known[1])
                self._alive[key] = (size, known[1])
            return
        self._alive[key] = (size, host)
        self._add(size, host=host)
        self._references[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: object) -> None:
        size, host = self._alive.pop(key)
        del self._references[key]
        self._add(-size, host=host)

    def _add(self, size: int, *, host: bool) -> None:
        if host:
            self.host_bytes += size
        else:
            self.live_bytes += size

    def _note_peak(self) -> None:
        self.peak_bytes = self.live_bytes
        parts: dict[str, int] = {}
        seen: set[int] = set()
        for kind, tensors in self._named().items():
            parts[kind] = 0
            for tensor in tensors:
                key = tensor.untyped_storage()._cdata
                if key in self._alive and key not in seen:
                    seen.add(key)
                    parts[kind] += self._alive[key][0]
        self.peak_parts = parts | {"other": self.peak_bytes - sum(parts.values())}
