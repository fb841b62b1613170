"""For a while, every process of a tensor group looks at whole sequences again (`parallel.tensor_sequence` off)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from megagpt.parallel.collectives import Region, SequenceRegion, TensorRegion
from megagpt.parallel.tensor import RankedDropout, SequencePositions


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Inside, what stands between the regions sees all positions, so that any number of them can be run.

    The shares of the weights are the same either way. Inside, the model is in evaluation mode.
    """
    changed: list[tuple[Any, SequenceRegion]] = []
    for module in model.modules():
        region = getattr(module, "region", None)
        if isinstance(region, SequenceRegion):
            changed.append((module, region))
            module.region = _whole(module, region)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, region in changed:
            module.region = region


def _whole(module: nn.Module, region: SequenceRegion) -> Region:
    if isinstance(module, SequencePositions | RankedDropout):
        return TensorRegion(region.group, 1, 0)  # it cuts nothing
    return TensorRegion(region.group, region.size, region.rank)
