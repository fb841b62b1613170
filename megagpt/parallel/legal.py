"""All layouts of a number of processes that can run: what `megagpt plan` shows, and tests go through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from megagpt.config.schema import TrainingRun
from megagpt.parallel.nearest import CHOICES, with_layout
from megagpt.parallel.plan import is_legal

KEYS = ("pipeline", "sequence", "tensor", "tensor_sequence", "zero_stage")


def allowed_layouts(config: TrainingRun, world_size: int, keys: Sequence[str] = KEYS) -> Iterator[TrainingRun]:
    """The configuration in every layout of so many processes that can run, in a fixed order.

    Degrees are divisors of the number of processes; layouts that `REFUSALS` or the arithmetic of batches refuse are
    left out.

    Args:
        config: what is laid out; everything but `keys` stays as it is.
        world_size: number of processes.
        keys: of `megagpt.parallel.nearest.CHOICES`, that are varied.
    """
    for chosen in product(*(CHOICES[key].values(config, world_size) for key in keys)):
        laid_out = with_layout(config, dict(zip(keys, chosen, strict=True)))
        if is_legal(laid_out, world_size):
            yield laid_out
