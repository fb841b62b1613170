"""The learning rate as a pure function of the step. A new schedule is one function and one line in SCHEDULES."""

from __future__ import annotations

import math
from collections.abc import Callable

from megagpt.config.schema import OptimSection

Schedule = Callable[[int], float]
"""0-based step -> learning rate of that step."""


def cosine(progress: float, optim: OptimSection) -> float:
    """Half a cosine from 1 to `min_lr_frac`. Source: Loshchilov & Hutter 2017, eq. 5, without restarts."""
    return optim.min_lr_frac + (1 - optim.min_lr_frac) * (1 + math.cos(math.pi * progress)) / 2


def wsd(progress: float, optim: OptimSection) -> float:
    """Stable at 1, then linear to `min_lr_frac` over the last `decay_frac`. Source: Hu et al. 2024, MiniCPM."""
    if optim.decay_frac == 0.0:
        return 1.0
    decayed = max(0.0, (progress - (1 - optim.decay_frac)) / optim.decay_frac)
    return 1 - (1 - optim.min_lr_frac) * decayed


def constant(progress: float, optim: OptimSection) -> float:  # noqa: ARG001 - one signature for all
    """Always 1."""
    return 1.0


SCHEDULES: dict[str, Callable[[float, OptimSection], float]] = {
    "cosine": cosine,
    "wsd": wsd,
    "constant": constant,
}
"""Name -> factor on the peak rate, given the fraction of the steps after the warm-up that are done."""


def lr_schedule(optim: OptimSection, max_steps: int) -> Schedule:
    """Linear warm-up to `optim.lr`, then the schedule named in the configuration; its end is the last step."""
    factor = SCHEDULES[optim.schedule]
    after_warmup = max(1, max_steps - 1 - optim.warmup_steps)

    def lr(step: int) -> float:
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        return optim.lr * factor(min(1.0, (step - optim.warmup_steps) / after_warmup), optim)

    return lr
