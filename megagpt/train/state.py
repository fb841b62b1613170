"""All that must survive a restart beside tensors. Random numbers do not: they follow from seed, step and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from megagpt.train.skips import Ranges
from megagpt.train.spikes import Window


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands after `step` optimizer steps. The data cursor follows from them and the skipped batches."""

    step: int = 0
    tokens: int = 0
    """Target tokens seen."""
    skipped_steps: int = 0
    """Steps without an update: gradients overflowed in fp16, were not finite, or the step was a spike."""
    refused_in_a_row: int = 0
    """The last steps without an update, those that fp16's loss scale dropped aside."""
    skipped_batches: Ranges = ()
    """Batches that were passed over or will be: all before this step, and those that a rollback skips."""
    recent: Window = ()
    """What tells a spike: loss and gradient norm of the last steps."""
    engine: Mapping[str, float] = field(default_factory=dict)
    """Counters of the optimizer (Engine.engine_state)."""
    metric_rows: int | None = None
    """Rows of metrics.jsonl up to this step; None where nothing has counted them."""

    def after_step(self, tokens: int, *, skipped: bool) -> Self:
        """The state one step later; `refused_in_a_row` and `recent` are the policy's to change."""
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
        """The inverse of `to_dict`, from JSON too; what an older version did not know is empty."""
        pairs = {name: tuple(map(tuple, values.get(name, ()))) for name in ("skipped_batches", "recent")}
        return cls(**{**values, **pairs})
