"""`megagpt plan`: every layout of a number of processes that can run, and what it costs, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from megagpt.config.schema import TrainingRun
from megagpt.errors import ConfigError
from megagpt.parallel.legal import allowed_layouts
from megagpt.parallel.memory import worst_stage
from megagpt.parallel.plan import is_legal, plan_batches

RECOMPUTE = ("none", "selective", "full")
RECOMPUTE_COST = {"none": 0.0, "selective": 0.0, "full": 1 / 3}
"""More FLOPs of a step: full recomputation is one more forward, a third of forward and backward. What selective
recomputation does again is attention alone, a few per cent. Source: Korthikanti et al. 2022, sections 5 and 6."""


@dataclass(frozen=True, slots=True)
class PlannedLayout:
    """One layout that can run."""

    tensor: int
    pipeline: int
    sequence: int
    data: int
    tensor_sequence: bool
    zero_stage: int
    recompute: str
    grad_accum_steps: int
    memory_bytes: float
    """Of the process that needs most, at its peak, by formulas."""
    idle: float
    """Share of a step in which a stage of the pipeline waits: (p - 1) / (m + p - 1) for p stages and m micro-batches.

    Source: Narayanan et al. 2021, section 2.2.1."""

    @property
    def overrides(self) -> str:
        """The words that choose it."""
        keys = ("tensor", "pipeline", "sequence", "tensor_sequence", "zero_stage")
        words = [f"parallel.{key}={str(getattr(self, key)).lower()}" for key in keys]
        return " ".join([*words, f"train.recompute={self.recompute}"])

    @property
    def cost(self) -> tuple[float, ...]:
        """What makes a layout slow, worst first; smaller is better.

        Time that is lost to recomputation and waiting stages counts most; then traffic, in the order in which it hurts:
        activations between tensor and sequence ranks in every layer, ZeRO-3's weights in every layer, ZeRO-2's
        gradients in every micro-batch.
        """
        busy = (1 + RECOMPUTE_COST[self.recompute]) / (1 - self.idle)
        recomputed = RECOMPUTE.index(self.recompute)
        traffic = (self.tensor * self.sequence, self.zero_stage == 3, recomputed, self.pipeline, self.zero_stage)
        return round(busy, 1), *map(float, traffic), float(self.tensor > 1 and not self.tensor_sequence)


def plan_layouts(
    config: TrainingRun, world_size: int, memory_gib: float | None, per_node: int | None
) -> list[PlannedLayout]:
    """All layouts that can run, the ones that promise most speed first.

    Args:
        config: of the run; its degrees, ZeRO stage and recomputation are varied, all else stays.
        world_size: processes.
        memory_gib: leave out what needs more in a process.
        per_node: processes of a host: leave out tensor groups that reach over two.

    Raises:
        ConfigError: nothing is left, and why.
    """
    found = []
    for laid_out in allowed_layouts(config, world_size):
        if per_node is not None and laid_out.parallel.tensor > per_node:
            continue
        found += _with_each_recompute(laid_out, world_size)
    if not found:
        raise ConfigError(
            f"no layout of {world_size} processes can run: train.global_batch_size={config.train.global_batch_size} in "
            f"micro-batches of {config.train.micro_batch_size} does not divide among them; change one of the three"
        )
    if memory_gib is not None:
        least = min(one.memory_bytes for one in found)
        found = [one for one in found if one.memory_bytes <= memory_gib * 2**30]
        if not found:
            raise ConfigError(
                f"no layout of {world_size} processes fits into {memory_gib:g} GiB; the smallest needs "
                f"{least / 2**30:.1f} GiB: use more processes, a smaller train.micro_batch_size, or offload"
            )
    return sorted(found, key=lambda one: (*one.cost, one.memory_bytes, one.overrides))


def _with_each_recompute(config: TrainingRun, world_size: int) -> list[PlannedLayout]:
    """One layout with each kind of recomputation that needs less memory than the cheaper kinds before it."""
    found: list[PlannedLayout] = []
    for recompute in RECOMPUTE:
        train = config.train.model_copy(update={"recompute": recompute})
        recomputing = config.model_copy(update={"train": train})
        if not is_legal(recomputing, world_size):
            continue
        planned = _planned(recomputing, world_size)
        if not found or planned.memory_bytes < found[-1].memory_bytes:
            found.append(planned)
    return found


def _planned(config: TrainingRun, world_size: int) -> PlannedLayout:
    plan = plan_batches(config, world_size)
    parallel = config.parallel
    _, memory = worst_stage(config, plan)
    return PlannedLayout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        sequence=parallel.sequence,
        data=plan.data_parallel,
        tensor_sequence=parallel.tensor_sequence,
        zero_stage=parallel.zero_stage,
        recompute=config.train.recompute,
        grad_accum_steps=plan.grad_accum_steps,
        memory_bytes=memory.total_bytes,
        idle=(parallel.pipeline - 1) / (plan.grad_accum_steps + parallel.pipeline - 1),
    )


def as_table(layouts: Sequence[PlannedLayout], top: int) -> Table:
    """The first ones, for a person."""
    table = Table(caption=f"{min(top, len(layouts))} of {len(layouts)} layouts; see `megagpt plan --help`")
    for heading in ("tensor", "pipeline", "sequence", "data", "ZeRO", "recompute", "micro-batches", "GiB", "idle"):
        table.add_column(heading, justify="right")
    for one in layouts[:top]:
        table.add_row(
            f"{one.tensor}{'+seq' if one.tensor_sequence else ''}",
            str(one.pipeline),
            str(one.sequence),
            str(one.data),
            str(one.zero_stage),
            one.recompute,
            str(one.grad_accum_steps),
            f"{one.memory_bytes / 2**30:.1f}",
            f"{one.idle:.0%}",
        )
    return table


def as_json(layouts: Sequence[PlannedLayout]) -> str:
    """All of them with everything known."""
    rows: list[dict[str, Any]] = [asdict(one) | {"overrides": one.overrides} for one in layouts]
    return json.dumps(rows, indent=1)
