"""Which batch a step reads, where some are passed over. A pure function of the step and the ranges."""

from __future__ import annotations

from collections.abc import Iterable

from megagpt.errors import CheckpointError

Ranges = tuple[tuple[int, int], ...]
"""[first, end) of batches, 0-based; in order and apart from each other where `merged` has made them."""


def merged(*ranges: Iterable[tuple[int, int]]) -> Ranges:
    """All of them in order, those that touch made one."""
    found: list[tuple[int, int]] = []
    for first, end in sorted((first, end) for some in ranges for first, end in some):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((first, end))
    return tuple(found)


def batch_of(step: int, skipped: Ranges) -> int:
    """The batch of a 0-based step: the step-th of those that are not skipped. Costs no more at a later step.

    Args:
        step: 0-based.
        skipped: as `merged` gives them.
    """
    batch = step
    for first, end in skipped:
        if batch < first:
            break
        batch += end - first
    return batch


def passed(step: int, skipped: Ranges) -> Ranges:
    """The ranges that a run has passed over when its next step is this one."""
    last_read = batch_of(step - 1, skipped) if step else -1
    return tuple(one for one in skipped if one[0] <= last_read)


def resumed(step: int, before: Ranges, configured: Iterable[tuple[int, int]]) -> Ranges:
    """The ranges of a run that goes on before a step: those of its history and those of the configuration.

    Raises:
        CheckpointError: a range of the configuration holds batches that the run has read already.
    """
    together = merged(before, configured)
    if passed(step, together) != passed(step, before):
        next_batch = batch_of(step, before)
        late = [list(one) for one in merged(configured) if one[0] < next_batch and one not in before]
        raise CheckpointError(
            f"train.skip_batches: {', '.join(map(str, late))} begins before batch {next_batch}, which is the next one "
            f"at step {step}: the run has read those batches. Begin at {next_batch} or later, or go on from an earlier "
            "checkpoint (remove the later ones)"
        )
    return together
