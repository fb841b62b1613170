"""What is measured: a loop that can take one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Loop(Protocol):
    """A model, its optimizer, and what one step does to them."""

    def step(self, windows: Sequence[Tensor]) -> float | Tensor:
        """One optimizer step over the micro-batches of it.

        Args:
            windows: one (b, T + 1) int64 tensor a micro-batch, on the CPU.

        Returns:
            The loss in nats a token; a tensor where the loop does not wait for the device.
        """


def inputs_and_targets(windows: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """(b, T + 1) -> what goes in, and what shall come next: each (b, T) on the device."""
    return windows[:, :-1].to(device, non_blocking=True), windows[:, 1:].to(device, non_blocking=True)
