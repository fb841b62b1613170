"""A run's configuration -> what each process of it holds in memory: integers and formulas only, no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megagpt.config.schema import TrainingRun
from megagpt.model.flops import muon_state_bytes, parameter_count
from megagpt.model.memory import MemoryEstimate, MemoryLayout, ZeroBuffers, held_parameters, memory_bytes
from megagpt.parallel.plan import BatchPlan
from megagpt.parallel.stages import held_parts, n_parts, plan_stages

_OWN_KEYS = {
    "reduce_bucket": "reduce_bucket_elements",
    "overlap": "overlap_communication",
    "prefetch": "prefetch_elements",
    "persistent": "keep_gathered_below_elements",
    "max_live": "max_live_elements",
}
"""Our name of a size -> the key of the section `parallel`."""

_ZERO_KEYS = {
    "reduce_bucket": "reduce_bucket_size",
    "overlap": "overlap_comm",
    "prefetch": "stage3_prefetch_bucket_size",
    "persistent": "stage3_param_persistence_threshold",
    "max_live": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
}
"""Our name of a size -> DeepSpeed's key under zero_optimization."""


def memory_layout(config: TrainingRun, plan: BatchPlan, stage: int = 0, *, fused: bool = True) -> MemoryLayout:
    """What a process of one stage of the pipeline holds; the processes of a stage are alike.

    Args:
        config: the run.
        plan: its batches.
        stage: place in the pipeline.
        fused: RMSNorm is a single kernel, as on a GPU.
    """
    parallel, train = config.parallel, config.train
    given = parallel.extra.get("zero_optimization", {})
    sizes: dict[str, Any] = {name: given[key] for name, key in _ZERO_KEYS.items() if given.get(key) is not None}
    own = {name: getattr(parallel, key) for name, key in _OWN_KEYS.items()}
    sizes |= {name: value for name, value in own.items() if value is not None}
    pipelined = parallel.pipeline > 1
    stages = plan_stages(config) if pipelined else ()
    return MemoryLayout(
        micro_batch_size=plan.micro_batch_size,
        accumulation=plan.grad_accum_steps,
        dtype=train.dtype,
        zero_stage=parallel.zero_stage,
        zero_parallel=plan.data_parallel * parallel.sequence,
        tensor=parallel.tensor,
        tensor_sequence=parallel.tensor_sequence,
        sequence=parallel.sequence,
        parts=tuple(stages[part] for part in held_parts(parallel, stage)) if pipelined else None,
        in_flight=in_flight(config, plan, stage),
        recompute=train.recompute,
        offload_activations=train.offload_activations,
        offload_optimizer=parallel.offload_optimizer != "none",
        offload_weights=parallel.offload_weights != "none",
        fused=fused,
        buffers=ZeroBuffers(**sizes),
    )


def in_flight(config: TrainingRun, plan: BatchPlan, stage: int) -> tuple[int, ...]:
    """For each part of a process, the most micro-batches whose activations it holds at once.

    1F1B: as many as stages follow, itself included. DualPipeV: 2 p - r on the way out and r + 1 on the way back on
    process r of p, as DeepSpeed's schedule runs it; a test counts.

    Source: Narayanan et al. 2021, section 2.2.1; DeepSpeed 0.19.8, runtime/pipe/schedule.py.
    """
    parallel = config.parallel
    if parallel.pipeline_schedule == "dualpipev":
        return n_parts(parallel) - stage, stage + 1
    return (min(parallel.pipeline - stage, plan.grad_accum_steps),)


def stage_memory(config: TrainingRun, plan: BatchPlan, *, fused: bool = True) -> list[MemoryEstimate]:
    """The memory of one process of each stage of the pipeline; one estimate where there is no pipeline."""
    return [
        memory_bytes(config.model, memory_layout(config, plan, stage, fused=fused))
        for stage in range(config.parallel.pipeline)
    ]


def worst_stage(config: TrainingRun, plan: BatchPlan, *, fused: bool = True) -> tuple[int, MemoryEstimate]:
    """The stage that needs most, and what it needs."""
    estimates = stage_memory(config, plan, fused=fused)
    return max(enumerate(estimates), key=lambda found: found[1].total_bytes)


def checkpoint_bytes(config: TrainingRun, plan: BatchPlan) -> tuple[int, int]:
    """The size of a checkpoint, and of the part of it that the process writes which writes most.

    fp32 weights and the optimizer's state: 12 bytes a parameter under AdamW. ZeRO shares them out; without it one
    process of a data axis writes all. An asynchronous save holds a copy of the part in host memory.
    """
    n_parameters = parameter_count(config.model)
    whole = muon_state_bytes(config.model) if config.optim.name == "muon" else 12 * n_parameters
    stages = plan_stages(config) if config.parallel.pipeline > 1 else ()
    everything = range(config.model.n_layer + 3)
    largest = max(
        held_parameters(
            config.model,
            [layer for part in held_parts(config.parallel, stage) for layer in stages[part]] if stages else everything,
            config.parallel.tensor,
        )
        for stage in range(config.parallel.pipeline)
    )
    shared_by = plan.data_parallel * config.parallel.sequence if config.parallel.zero_stage else 1
    return whole, whole * largest // (n_parameters * shared_by)


def recompute_memory(config: TrainingRun, plan: BatchPlan) -> dict[str, MemoryEstimate]:
    """What each kind of recomputation would need on the stage that needs most, by its words in the configuration."""
    found = {}
    for kind in ("none", "selective", "full"):
        for offload in (False, True):
            estimates = [
                memory_bytes(
                    config.model,
                    replace(memory_layout(config, plan, stage), recompute=kind, offload_activations=offload),
                )
                for stage in range(config.parallel.pipeline)
            ]
            words = f"recompute={kind}" + ", offload_activations=true" * offload
            found[words] = max(estimates, key=lambda estimate: estimate.total_bytes)
    return found
