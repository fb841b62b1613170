"""The plan of a run in words and numbers: `--check`, plan.json, and the header of a run. Needs no torch."""

from __future__ import annotations

import platform
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from megagpt.config.schema import TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.model import flops
from megagpt.model.memory import MemoryEstimate
from megagpt.parallel.memory import checkpoint_bytes, recompute_memory, worst_stage
from megagpt.parallel.plan import BatchPlan, plan_batches
from megagpt.parallel.stages import held_parts, plan_stages
from megagpt.train.compatible import check_tokens

_PACKAGES = (
    "megagpt",
    "torch",
    "deepspeed",
    "flash_attn",
    "numpy",
    "safetensors",
    "tokenizers",
    "tiktoken",
    "transformers",
    "datasets",
    "lm_eval",
)


def package_versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def check_run(config: TrainingRun, world_size: int) -> str:
    """All that can be told before a process starts, for `--check`: does everything fit, and what is the plan.

    Raises:
        ConfigError: a layout, batch or vocabulary that cannot work.
        DataError: token files or a tokenizer that are missing, damaged or do not fit.
    """
    plan = plan_batches(config, world_size)
    check_tokens(config, open_mixture(config.data.train, plan.seq_len, config.run.seed))
    return plan_as_text(describe_plan(config, plan))


def describe_plan(config: TrainingRun, plan: BatchPlan) -> dict[str, Any]:
    """Sizes, batch arithmetic and memory of a run, as numbers."""
    seq_len = config.model.max_seq_len
    stage, memory = worst_stage(config, plan)
    if config.optim.name == "muon":
        memory = _with_muon(config, plan, memory)
    samples = config.train.max_steps * plan.global_batch_size
    checkpoint, largest_part = checkpoint_bytes(config, plan)
    return {
        "parameters": flops.parameter_count(config.model),
        "flops_per_token": flops.flops_per_token(config.model, seq_len),
        "world_size": plan.world_size,
        "data_parallel": plan.data_parallel,
        "micro_batch_size": plan.micro_batch_size,
        "grad_accum_steps": plan.grad_accum_steps,
        "global_batch_size": plan.global_batch_size,
        "seq_len": seq_len,
        "tokens_per_step": plan.tokens_per_step,
        "total_tokens": plan.tokens_per_step * config.train.max_steps,
        "memory_stage": stage if config.parallel.pipeline > 1 else None,
        "stages": _describe_stages(config) if config.parallel.pipeline > 1 else None,
        "memory_bytes": asdict(memory) | {"total_bytes": memory.total_bytes},
        "memory_bytes_by_recompute": {
            words: {"total_bytes": found.total_bytes, "host_bytes": found.host_bytes}
            for words, found in recompute_memory(config, plan).items()
        },
        "checkpoint_bytes": checkpoint,
        "checkpoint_host_bytes": largest_part if config.checkpoint.asynchronous else 0,
        "data": [
            asdict(share) | {"prefix": str(share.prefix)}
            for share in open_mixture(config.data.train, seq_len, config.run.seed).describe(samples)
        ],
    }


def plan_as_text(described: dict[str, Any]) -> str:
    """The plan for a person."""
    d = described
    total_flops = d["flops_per_token"] * d["total_tokens"]
    lines = [
        f"model      {d['parameters']:,} parameters, {d['flops_per_token'] / 1e9:.4g} GFLOP a token",
        f"batch      {d['global_batch_size']} sequences x {d['seq_len']} tokens = {d['tokens_per_step']:,} a step",
        f"           = {d['micro_batch_size']} sequences x {d['grad_accum_steps']} micro-batches "
        f"x {d['data_parallel']} processes",
        f"run        {d['total_tokens']:,} tokens, {total_flops:.3g} FLOP",
        *(
            f"stage {number:<4} {stage['layers']}: {stage['flops']:.1%} of the FLOPs"
            for number, stage in enumerate(d["stages"] or ())
        ),
        *_memory_lines(d),
        f"checkpoint {_mib(d['checkpoint_bytes'])} MiB on disk, and {_mib(d['checkpoint_host_bytes'])} MiB "
        "of host memory of the process that writes most",
    ]
    return "\n".join([*lines, *(f"data       {line}" for line in _data_lines(d["data"]))])


def _describe_stages(config: TrainingRun) -> list[dict[str, Any]]:
    """For each stage of the pipeline the layers it holds, in words, and its share of the model's FLOPs."""
    n_layer = config.model.n_layer
    costs = flops.layer_flops(config.model, config.model.max_seq_len)
    parts = plan_stages(config)
    described = []
    for stage in range(config.parallel.pipeline):
        held = [parts[part] for part in held_parts(config.parallel, stage)]
        share = sum(costs[index] for part in held for index in part) / sum(costs)
        described.append({"layers": " and ".join(_layers_in_words(part, n_layer) for part in held), "flops": share})
    return described


def _layers_in_words(part: range, n_layer: int) -> str:
    """`embedding, blocks 0-3` of indices into `Decoder.layers()`."""
    blocks = [index - 1 for index in part if 1 <= index <= n_layer]
    names = {0: "embedding", n_layer + 1: "final norm", n_layer + 2: "head"}
    words = {index: name for index, name in names.items() if index in part}
    if blocks:
        words[1] = f"blocks {blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"
    return ", ".join(words[index] for index in sorted(words))


def _with_muon(config: TrainingRun, plan: BatchPlan, memory: MemoryEstimate) -> MemoryEstimate:
    """The estimate for AdamW with the state of Muon instead."""
    shared_by = plan.data_parallel if config.parallel.zero_stage else 1
    optimizer_bytes = flops.muon_state_bytes(config.model) / shared_by
    more = optimizer_bytes - memory.optimizer_bytes
    phases = {phase: size + more for phase, size in memory.phase_bytes.items()}
    return replace(memory, optimizer_bytes=optimizer_bytes, phase_bytes=phases)


def _memory_lines(described: dict[str, Any]) -> list[str]:
    memory, stage = described["memory_bytes"], described["memory_stage"]
    phases = memory["phase_bytes"]
    who = "a process" if stage is None else f"a process of stage {stage}, which needs most"
    parts = [(name, size) for name, size in memory.items() if name not in ("phase_bytes", "total_bytes") and size]
    total = memory["total_bytes"]
    recompute = described["memory_bytes_by_recompute"]
    most = max(found["total_bytes"] for found in recompute.values())
    return [
        f"memory     {who}, estimated: {_mib(total)} MiB at its peak ({max(phases, key=phases.__getitem__)})",
        "           of " + ", ".join(f"{name.removesuffix('_bytes')} {_mib(size)} MiB" for name, size in parts),
        "           peak of " + ", ".join(f"{name} {_mib(size)} MiB" for name, size in phases.items()),
        *(f"           with {words}: {_needs(found, most)}" for words, found in recompute.items()),
    ]


def _needs(found: dict[str, float], most: float) -> str:
    saved = f", saves {_mib(most - found['total_bytes'])} MiB"
    on_host = f", {_mib(found['host_bytes'])} MiB on the host" if found["host_bytes"] else ""
    return f"{_mib(found['total_bytes'])} MiB{saved}{on_host}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def _data_lines(described: list[dict[str, Any]]) -> list[str]:
    return [
        f"{row['prefix']}: {row['n_tokens']:,} tokens in {row['n_documents']:,} documents; "
        f"{row['share']:.1%} of the samples = {row['epochs']:.3g} epochs"
        for row in described
    ]
