"""What each process of a layout does: two steps of training on random tokens, the second one measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch

from megagpt.config.schema import TrainingRun
from megagpt.engine.accounting import measure_step
from megagpt.engine.engine import init_distributed
from megagpt.model.batch import TokenBatch
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.parallel.plan import BatchPlan, plan_batches
from megagpt.train.build import build_engine

_TIMEOUT = timedelta(minutes=5)


def measure_layout(rank: int, world_size: int, config: TrainingRun, out: Path) -> None:
    """In every process of a group: train and count; rank 0 writes what all of them found, in rank order."""
    torch.set_num_threads(1)
    init_distributed(_TIMEOUT, device_type="cpu")
    mesh = make_mesh(rank, world_size, rank, torch.device("cpu"), config.parallel)
    plan = plan_batches(config, world_size)
    engine = build_engine(config, plan, mesh)
    micro_batches = _random_batches(config, plan, mesh)
    engine.train_step(micro_batches, config.optim.lr)
    measured = measure_step(engine, micro_batches, config.optim.lr)
    found = mesh.gather(
        asdict(measured)
        | {
            "rank": rank,
            "stage": mesh.pipeline_rank,
            "optimizer_class": engine.optimizer_class,
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters()),
        }
    )
    if mesh.is_main:
        out.write_text(json.dumps(found))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def _random_batches(config: TrainingRun, plan: BatchPlan, mesh: Mesh) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(mesh.data_parallel_rank)
    shape = (plan.micro_batch_size, plan.seq_len + 1)
    return [
        TokenBatch.of_windows(torch.randint(config.model.vocab_size, shape, generator=generator))
        for _ in range(plan.grad_accum_steps)
    ]
