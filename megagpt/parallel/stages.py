"""Which layers each stage of a pipeline holds: integers only."""

from __future__ import annotations

from itertools import accumulate, pairwise

from megagpt.config.schema import ParallelSection, TrainingRun
from megagpt.model.flops import layer_flops


def n_parts(parallel: ParallelSection) -> int:
    """Stretches that the list of layers is cut into. In DualPipeV's V each process holds two of them."""
    return parallel.pipeline * (2 if parallel.pipeline_schedule == "dualpipev" else 1)


def plan_stages(config: TrainingRun) -> tuple[range, ...]:
    """The layers of each part, as indices into `Decoder.layers()`: embedding, blocks, final norm, head.

    As `parallel.pipeline_split` says, or so that the part with the most FLOPs has as few as possible: a pipeline is as
    fast as its slowest stage.
    """
    split, n_layer = config.parallel.pipeline_split, config.model.n_layer
    if split is None:
        return balanced(layer_flops(config.model, config.model.max_seq_len), n_parts(config.parallel))
    ends = [1 + blocks for blocks in accumulate(split)]
    return tuple(range(start, stop) for start, stop in pairwise([0, *ends[:-1], n_layer + 3]))


def held_parts(parallel: ParallelSection, pipeline_rank: int) -> tuple[int, ...]:
    """The parts of one process: one, or its leg out and its leg back in DualPipeV's V."""
    if parallel.pipeline_schedule == "dualpipev":
        return pipeline_rank, n_parts(parallel) - 1 - pipeline_rank
    return (pipeline_rank,)


def own_layers(config: TrainingRun, pipeline_rank: int) -> list[int]:
    """The layers that a process of the pipeline holds."""
    parts = plan_stages(config)
    return [index for part in held_parts(config.parallel, pipeline_rank) for index in parts[part]]


def balanced(costs: list[float], parts: int) -> tuple[range, ...]:
    """Cut a list into contiguous parts, none empty, so that the dearest part is as cheap as possible.

    Of the cuts that reach that, the one whose costs differ least (smallest sum of squares).

    Raises:
        ValueError: fewer costs than parts.
    """
    if len(costs) < parts:
        raise ValueError(f"{len(costs)} layers cannot be cut into {parts} parts")
    before = [0.0, *accumulate(costs)]
    best: list[tuple[float, float, tuple[int, ...]]] = [
        (before[stop], before[stop] ** 2, (0, stop)) for stop in range(len(costs) + 1)
    ]
    for part in range(2, parts + 1):
        best = [
            min(
                (
                    (max(best[start][0], cost), best[start][1] + cost**2, (*best[start][2], stop))
                    for start in range(part - 1, stop)
                    for cost in [before[stop] - before[start]]
                ),
                default=(0.0, 0.0, ()),
            )
            for stop in range(len(costs) + 1)
        ]
    return tuple(range(start, stop) for start, stop in pairwise(best[-1][2]))
