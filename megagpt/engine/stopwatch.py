"""How long the device worked on something, without waiting for it."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Measures one span a step. On CUDA by events: nothing waits until `seconds` is asked."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * is_cuda)]  # type: ignore[no-untyped-call]
        self._times = [0.0, 0.0]

    def start(self) -> None:
        """The span begins with what is queued from here on."""
        self._note(0)

    def stop(self) -> None:
        """It ends with what was queued until here."""
        self._note(1)

    @property
    def seconds(self) -> float:
        """Length of the last span; on CUDA, asked when the device is through with it."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._times[1] - self._times[0]

    def _note(self, index: int) -> None:
        if self._events:
            self._events[index].record()
        else:
            self._times[index] = time.perf_counter()
