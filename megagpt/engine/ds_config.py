"""Our configuration -> DeepSpeed's dictionary. The only place where DeepSpeed's keys are spelled."""

from __future__ import annotations

import difflib
import sys
from typing import Any

from megagpt.config.schema import ParallelSection, TrainingRun
from megagpt.errors import ConfigError
from megagpt.parallel.plan import BatchPlan

EXTRA_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "compile",
        "data_types",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "fp16",
        "memory_breakdown",
        "prescale_gradients",
        "gradient_predivide_factor",
        "seq_parallel_communication_data_type",
        "torch_autocast",
        "wall_clock_breakdown",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
"""Top-level keys that `parallel.extra` may hold. DeepSpeed ignores unknown ones without a word; we do not."""


ZERO_KEYS = {
    "overlap_communication": "overlap_comm",
    "reduce_bucket_elements": "reduce_bucket_size",
    "gather_bucket_elements": "allgather_bucket_size",
    "prefetch_elements": "stage3_prefetch_bucket_size",
    "keep_gathered_below_elements": "stage3_param_persistence_threshold",
    "max_live_elements": "stage3_max_live_parameters",
    "update_elements": "sub_group_size",
    "shard_within_node": "zero_hpz_partition_size",
}
"""Our key of the section `parallel` -> DeepSpeed's of `zero_optimization`; what is not set is left to DeepSpeed."""


def ds_config(config: TrainingRun, plan: BatchPlan) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`.

    Raises:
        ConfigError: `parallel.extra` holds a key that DeepSpeed does not know, one that megagpt sets, or the section
            of another precision.
    """
    is_muon = config.optim.name == "muon"  # ShardedMuon clips, keeps fp32 weights and adds gradients up by itself
    settings: dict[str, Any] = {
        # Ulysses' sequence axis is folded into what DeepSpeed takes for data-parallel processes.
        "train_batch_size": plan.global_batch_size * config.parallel.sequence,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.grad_accum_steps,
        "gradient_clipping": 0.0 if is_muon else config.optim.grad_clip,  # it clips at 1.0 where the key is absent
        "steps_per_print": sys.maxsize,
        "zero_optimization": _zero(config),
    }
    if config.train.dtype != "fp32" and not is_muon:
        settings[config.train.dtype] = {"enabled": True}
        # By default bf16 accumulates in bf16, and buffers stay in fp32: turned queries would not fit to the values.
        settings["data_types"] = {"grad_accum_dtype": "fp32", "buffer_dtype": config.train.dtype}
    if config.parallel.pipeline > 1:
        # By default activations are cut over the tensor group once more on their way, which goes wrong without a word
        # where the group holds parts of the sequence; and recomputation is the reentrant one.
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}
    if config.parallel.offload_optimizer != "none":
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW: see megagpt/engine/adamw.py
    for key in config.parallel.extra:
        if key not in EXTRA_KEYS:
            nearest = difflib.get_close_matches(key, EXTRA_KEYS, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"known: {', '.join(sorted(EXTRA_KEYS))}"
            raise ConfigError(f"parallel.extra.{key}: DeepSpeed does not know this key, or megagpt sets it; {hint}")
        if key in ("bf16", "fp16") and key != config.train.dtype:
            raise ConfigError(
                f"parallel.extra.{key}: train.dtype is {config.train.dtype}; set train.dtype={key}, or leave it out"
            )
    _add(settings, config.parallel.extra, "parallel.extra")
    return settings


def _zero(config: TrainingRun) -> dict[str, Any]:
    stage = config.parallel.zero_stage if config.optim.name == "adamw" else 0
    settings: dict[str, Any] = {"stage": stage}
    if stage in (1, 2):
        settings["contiguous_gradients"] = stage == 2
    settings |= _offload(config.parallel)
    chosen = {deepspeeds: getattr(config.parallel, ours) for ours, deepspeeds in ZERO_KEYS.items()}
    return settings | {key: value for key, value in chosen.items() if value is not None}


def _offload(parallel: ParallelSection) -> dict[str, Any]:
    places = {"offload_optimizer": parallel.offload_optimizer, "offload_param": parallel.offload_weights}
    settings: dict[str, Any] = {key: {"device": place} for key, place in places.items() if place != "none"}
    if parallel.offload_optimizer == "nvme":
        settings["offload_optimizer"]["nvme_path"] = str(parallel.nvme_dir)
        settings["offload_optimizer"]["buffer_count"] = 4  # weight, gradient, both moments of what is updated at once
    return settings


def _add(settings: dict[str, Any], extra: dict[str, Any], where: str) -> None:
    """Merge `extra` into `settings`; a value that is already there may not be said again."""
    for key, value in extra.items():
        at = f"{where}.{key}"
        if key not in settings:
            settings[key] = value
        elif isinstance(value, dict) and isinstance(settings[key], dict):
            _add(settings[key], value, at)
        else:
            raise ConfigError(
                f"{at}: megagpt sets this itself ({settings[key]!r}); change the megagpt key behind it instead"
            )
