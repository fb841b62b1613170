"""All that must survive a restart beside tensors. Random numbers do not: they follow from seed, step and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands after `step` optimizer steps. The data cursor is the step itself."""

    step: int = 0
    tokens: int = 0
    """Target tokens seen."""
    skipped_steps: int = 0
    """fp16 steps whose gradients overflowed."""
    engine: Mapping[str, float] = field(default_factory=dict)
    """Counters of the optimizer (Engine.engine_state)."""

    def after_step(self, tokens: int, *, skipped: bool) -> Self:
        """The state one step later."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            skipped_steps=self.skipped_steps + int(skipped),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(**values)
