"""One micro-batch, as a model and its loss see it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from megagpt.model.loss import IGNORED_TARGET, count_targets


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """b sequences of T tokens, each with the token that follows it."""

    inputs: Tensor
    """(b, T) int64."""
    targets: Tensor
    """(b, T) int64: the token that follows each input, or `IGNORED_TARGET` where none counts."""

    @classmethod
    def of_windows(cls, windows: Tensor, counted: int | None = None) -> Self:
        """From (b, T + 1) tokens. The rows from `counted` on only fill the batch up: their targets do not count."""
        targets = windows[:, 1:].clone()
        if counted is not None:
            targets[counted:] = IGNORED_TARGET
        return cls(windows[:, :-1], targets)

    @property
    def n_targets(self) -> int:
        """Targets that count. Waits for the device: ask before the batch is moved."""
        return int(count_targets(self.targets))

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        moved = {each.name: getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)}
        return type(self)(**moved)

    def share(self, rank: int, size: int) -> Self:
        """One of `size` equal stretches of every sequence: what a process of a sequence group works on."""
        return type(self)(**{each.name: getattr(self, each.name).chunk(size, dim=1)[rank] for each in fields(self)})
