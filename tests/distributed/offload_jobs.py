"""What the processes of test_offload.py do beside running engines as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from megagpt.config.schema import TrainingRun
from megagpt.engine import engine as engine_module
from megagpt.engine.accounting import TensorAccounting
from megagpt.engine.ds_config import ds_config
from megagpt.engine.engine import init_distributed
from megagpt.engine.pipeline import PipelinedEngine
from megagpt.parallel.mesh import make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.build import build_engine, build_share
from tests.distributed.jobs import Job, run_jobs


def run_with_deepspeeds_tied_reduction(jobs: list[Job], out: Path) -> None:
    """Run jobs with DeepSpeed's own way of adding up a tied head's gradients in place of ours."""
    PipelinedEngine._add_up_tied_gradients = lambda self, engine: PipelineEngine._exec_reduce_tied_grads(engine)
    run_jobs(jobs, out)


def run_with_deepspeeds_accumulation(jobs: list[Job], out: Path) -> None:
    """Run jobs without telling DeepSpeed in which type it shall add up gradients."""

    def without_accumulation(config: TrainingRun, plan: object) -> dict[str, object]:
        settings = ds_config(config, plan)
        del settings["data_types"]["grad_accum_dtype"]
        return settings

    engine_module.ds_config = without_accumulation
    run_jobs(jobs, out)


def zero_0_in_bf16(out: Path) -> None:
    """How many updates Adam has made under ZeRO-0 before the first step, and what they did to a weight."""
    import deepspeed

    join()
    model = torch.nn.Linear(4, 4)
    adamw = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    settings = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    before = model.weight.detach().norm().item()
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)
    steps = [int(state["step"]) for state in adamw.state.values()]
    shrunk = engine.optimizer.fp32_groups[0][0].detach().norm().item() / before
    out.write_text(json.dumps({"steps": steps, "shrunk": shrunk}))
    torch.distributed.destroy_process_group()


def construct(large: TrainingRun, small: list[TrainingRun], folder: Path) -> None:
    """Make engines, and write what that took and what came of it.

    Writes:
        `peaks.json`: for each process, most bytes of tensors at a time while the weights of `large` were made.
        `RANK-INDEX.pt`: this process's part of each weight of the small models.
    """
    rank, world_size = join()
    mesh = make_mesh(rank, world_size, rank, torch.device("cpu"), large.parallel)
    plan = plan_batches(large, world_size)
    peaks: list[int] = []
    fill = engine_module.fill_in_parts

    def measured_fill(*args: object) -> None:
        peaks.append(_peak_bytes(lambda: fill(*args)))

    if large.parallel.zero_stage == 3:
        engine_module.fill_in_parts = measured_fill
        build_engine(large, plan, mesh)
        engine_module.fill_in_parts = fill
    else:
        peaks.append(_peak_bytes(lambda: build_share(large, mesh)))
    for index, config in enumerate(small):
        model = build_engine(config, plan_batches(config, world_size), mesh).model
        parts = {name: parameter.ds_tensor.clone() for name, parameter in model.named_parameters()}
        torch.save(parts, folder / f"{rank}-{index}.pt")
    gathered = mesh.gather(peaks[0])
    if mesh.is_main:
        (folder / "peaks.json").write_text(json.dumps(gathered))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def join() -> tuple[int, int]:
    torch.set_num_threads(1)
    init_distributed(timedelta(seconds=120), device_type="cpu")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _peak_bytes(make: Callable[[], object]) -> int:
    """Most bytes of tensors that were alive at once, beside those that were there before."""
    with TensorAccounting(dict) as accounting:
        before = accounting.live_bytes
        made = make()
    del made
    return accounting.peak_bytes - before
