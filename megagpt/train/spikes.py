"""Is this step's loss or gradient norm far outside of what the last ones were?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Window = tuple[tuple[float, float], ...]
"""(loss in nats, gradient norm) of the last steps, oldest first."""

SMALLEST_EXCESS = 0.02
"""Of the mean: nearly constant values have no deviation to speak of, and no spikes below this."""


@dataclass(frozen=True, slots=True)
class SpikeRule:
    """What counts as a spike. Source: OLMo-core, `SkipStepOptimizer`: 6 sigmas over 128 steps, once half are there."""

    sigmas: float
    window: int
    """Steps."""

    def judge(self, recent: Window, loss: float, grad_norm: float) -> str:
        """In words what is far above; nothing where all is as usual.

        Args:
            recent: the steps before.
            loss: of this step, nats.
            grad_norm: of this step, before clipping.
        """
        if len(recent) < max(2, self.window // 2):
            return ""
        found = [
            self._words("loss", loss, [past for past, _ in recent]),
            self._words("gradient norm", grad_norm, [past for _, past in recent]),
        ]
        return " and ".join(words for words in found if words)

    def added(self, recent: Window, loss: float, grad_norm: float) -> Window:
        """The window one step later; a step whose values are not finite leaves it as it is."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return recent
        return (*recent, (loss, grad_norm))[-self.window :]

    def _words(self, what: str, value: float, past: Sequence[float]) -> str:
        mean = math.fsum(past) / len(past)
        sigma = math.sqrt(math.fsum((each - mean) ** 2 for each in past) / (len(past) - 1))
        excess = value - mean
        if excess <= max(self.sigmas * sigma, SMALLEST_EXCESS * abs(mean)):
            return ""
        times = f"{excess / sigma:.1f} sigmas" if sigma else "far"
        return f"{what} {value:.4g} is {times} above the mean {mean:.4g} of the last {len(past)} steps"
