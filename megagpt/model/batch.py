"""One micro-batch, as a model and its loss see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
    documents: Tensor | None = None
    """(b, T) int32: which document each input belongs to, rising from 0 in a row; None where they see each other."""

    @classmethod
    def of_windows(cls, windows: Tensor, documents: Tensor | None = None, *, counted: int | None = None) -> Self:
        """From (b, T + 1) tokens, and the document of each where documents are kept apart.

        Then a target of another document than its input does not count: nothing foretells it. The rows from `counted`
        on only fill the batch up: their targets do not count.
        """
        targets = windows[:, 1:].clone()
        if counted is not None:
            targets[counted:] = IGNORED_TARGET
        if documents is None:
            return cls(windows[:, :-1], targets)
        targets[documents[:, 1:] != documents[:, :-1]] = IGNORED_TARGET
        return cls(windows[:, :-1], targets, documents[:, :-1].contiguous())

    @property
    def n_targets(self) -> int:
        """Targets that count. Waits for the device: ask before the batch is moved."""
        return int(count_targets(self.targets))

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def share(self, rank: int, size: int) -> Self:
        """One of `size` equal stretches of every sequence: what a process of a sequence group works on.

        The documents stay those of whole sequences: attention is over these, and positions depend on what was before.
        """
        return replace(self._each(lambda tensor: tensor.chunk(size, dim=1)[rank]), documents=self.documents)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        documents = None if self.documents is None else change(self.documents)
        return type(self)(change(self.inputs), change(self.targets), documents)
