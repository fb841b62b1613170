"""fp16's loss scale: it falls where gradients overflow, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SMALLEST = 1.0
"""DeepSpeed lowers a scale no further than `parallel.extra.fp16.min_loss_scale`, which is at least this."""


class LossScale:
    """DeepSpeed's scaler of one optimizer, watched.

    At its smallest scale DeepSpeed 0.19.8 raises a bare Exception for the next overflow, or what it takes for one, on
    which every process ends without a word about the rank. Here it does not: whoever trains learns from `can_fall` that
    nothing will be done about an overflow.

    Args:
        optimizer: DeepSpeed's.
    """

    def __init__(self, optimizer: Any) -> None:
        self._scaler = optimizer.loss_scaler
        if self._scaler.dynamic:
            self._scaler.raise_error_at_min_scale = False
        self._fresh = self._at_start = dict(vars(self._scaler))

    @property
    def value(self) -> float:
        """What the next loss is multiplied with."""
        return float(self._scaler.cur_scale)

    def begin(self) -> None:
        """A step begins."""
        self._at_start = dict(vars(self._scaler))

    @property
    def of_step(self) -> float:
        """What this step's loss was multiplied with."""
        return float(self._at_start["cur_scale"])

    @property
    def can_fall(self) -> bool:
        """Whether an overflow with the scale of this step brings a smaller one."""
        return bool(self._scaler.dynamic) and self.of_step > self._scaler.min_scale

    def take_back(self) -> None:
        """The step was dropped for another reason than an overflow, which says nothing about the scale."""
        vars(self._scaler).update(self._at_start)

    @contextmanager
    def set_aside(self, value: float) -> Iterator[None]:
        """Inside, steps are computed with this scale; afterwards all is as before."""
        now, at_start = dict(vars(self._scaler)), self._at_start
        self._scaler.cur_scale = value
        try:
            yield
        finally:
            vars(self._scaler).update(now)
            self._at_start = at_start

    def state(self) -> dict[str, float]:
        """For a checkpoint; nothing of a fixed scale (`parallel.extra.fp16.loss_scale`)."""
        if not self._scaler.dynamic:
            return {}
        return {
            "loss_scale": float(self._scaler.cur_scale),
            "scaler_iter": int(self._scaler.cur_iter),
            "last_overflow_iter": int(self._scaler.last_overflow_iter),
            "hysteresis": int(self._scaler.cur_hysteresis),
        }

    def restore(self, state: Mapping[str, float]) -> None:
        """The inverse of `state`. What another precision has saved has none: then the scale begins anew.

        A fixed scale stays the configuration's.
        """
        if not self._scaler.dynamic:
            return
        if "scaler_iter" not in state:
            vars(self._scaler).update(self._fresh)
            return
        self._scaler.cur_scale = state["loss_scale"]
        self._scaler.cur_iter = int(state["scaler_iter"])
        self._scaler.last_overflow_iter = int(state["last_overflow_iter"])
        self._scaler.cur_hysteresis = int(state["hysteresis"])
