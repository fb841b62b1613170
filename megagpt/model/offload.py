"""Saved activations kept in host memory between forward and backward. Applied from outside, as recomputation is."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_ON_HOST: ContextVar[bool] = ContextVar("on_host", default=False)


def held_on_host() -> bool:
    """Whether the tensors that are made now stand for host memory (where the device is the CPU, all of it is)."""
    return _ON_HOST.get()


def run_with_activations_on_host(module: nn.Module, forward: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    """Run a module's forward; what autograd keeps of it waits for backward in host memory.

    Weights stay where they are. Values come back as they were, bit for bit, strides included. The copies run in order
    with the computation, on its stream.

    Args:
        module: whose parameters and buffers are not activations.
        forward: what runs.
        args: its arguments.
        named: its arguments by keyword.

    Source: Rajbhandari et al. 2021 (ZeRO-Infinity), section 5.1.2 (activations offloaded to CPU memory).
    """
    host = _Host([*module.parameters(), *module.buffers()])
    with saved_tensors_hooks(host.take, lambda held: held()):
        return forward(*args, **named)


class _Host:
    """Takes saved tensors of one forward to the host: the storage of several views once."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._weights = weights
        self._copies: dict[tuple[int, int], tuple[weakref.ref[torch.UntypedStorage], _HostCopy]] = {}

    def take(self, saved: Tensor) -> Callable[[], Tensor]:
        """What gives the tensor back."""
        storage = saved.untyped_storage()
        for weight in self._weights:
            inside = int(saved.storage_offset()) - int(weight.storage_offset())
            if storage._cdata == weight.untyped_storage()._cdata and 0 <= inside < weight.numel():
                # By the weight, not by `saved`: whatever alias of it that is, ZeRO-3 can free and gather the weight.
                return partial(_view_of, weight, saved.size(), saved.stride(), inside)
        key = (storage._cdata, saved._version)
        alive, copy = self._copies.get(key, (None, None))
        if copy is None or alive is None or alive() is not storage:  # another storage may have come to its address
            copy = _HostCopy(storage, saved.device)
            self._copies[key] = (weakref.ref(storage), copy)
        return partial(copy.view, saved.dtype, int(saved.storage_offset()), saved.size(), saved.stride())


class _HostCopy:
    """The bytes of one storage on the host."""

    def __init__(self, storage: torch.UntypedStorage, device: torch.device) -> None:
        there = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        with _making_host_tensors():
            self._bytes = torch.empty_like(there, device="cpu", pin_memory=device.type == "cuda")
            self._bytes.copy_(there, non_blocking=True)
        self._device = device
        self._back: weakref.ref[torch.UntypedStorage] | None = None

    def view(self, dtype: torch.dtype, offset: int, size: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """A tensor on the device as it was; those that are there at the same time share their storage."""
        storage = self._back() if self._back is not None else None
        if storage is None:
            storage = self._bytes.to(self._device, non_blocking=True, copy=True).untyped_storage()
            self._back = weakref.ref(storage)
        return torch.empty(0, dtype=dtype, device=self._device).set_(storage, offset, size, stride)


def _view_of(weight: Tensor, size: torch.Size, stride: tuple[int, ...], inside: int) -> Tensor:
    """As saved, of the weight as it is by now: gathered again."""
    return weight.detach().as_strided(size, stride, weight.storage_offset() + inside)


@contextmanager
def _making_host_tensors() -> Iterator[None]:
    token = _ON_HOST.set(True)
    try:
        yield
    finally:
        _ON_HOST.reset(token)
