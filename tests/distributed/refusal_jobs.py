"""Engines whose judge refuses a step, beside engines that never saw it."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import torch

from megagpt.config.schema import TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.engine.engine import init_distributed
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.batches import TrainBatches
from megagpt.train.build import build_engine

LR = 3e-3
REFUSED = 2
STEPS = 5


def refuse_in_each(configs: dict[str, TrainingRun], out: Path) -> None:
    """For every configuration, of the same degrees: what a refused step left behind."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True
    torch.set_num_threads(1)
    init_distributed(timedelta(seconds=120), device_type="cpu")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    parallel = next(iter(configs.values())).parallel
    mesh = make_mesh(rank, world_size, rank, torch.device("cpu"), parallel)
    found = {}
    for name, config in configs.items():
        refused, told = _train(config, mesh, refuse=REFUSED)
        without, _ = _train(config, mesh, refuse=None)
        same = refused.keys() == without.keys() and all(torch.equal(refused[key], without[key]) for key in without)
        found[name] = told | {"same": all(mesh.gather(same)), "values": len(without)}
    if mesh.is_main:
        out.write_text(json.dumps(found))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def _train(config: TrainingRun, mesh: Mesh, refuse: int | None) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """(tensors and counters that a checkpoint would hold, what the steps told)."""
    plan = plan_batches(config, mesh.world_size)
    engine = build_engine(config, plan, mesh)
    batches = TrainBatches(open_mixture(config.data.train, plan.seq_len, config.run.seed), plan, mesh)
    skipped, norms = [], []
    for batch in range(STEPS):
        if refuse is None and batch == REFUSED:
            continue
        # One rank alone refuses: the others must follow.
        refuses = batch == refuse and mesh.rank == mesh.world_size - 1
        outcome = engine.train_step(
            batches.step(batch), LR, judge=lambda loss, norm, refuses=refuses: not refuses, together=True
        )
        skipped.append(outcome.skipped)
        norms.append(outcome.grad_norm)
    state = {
        f"{piece.name}/{piece.start}/{kind}": value.clone()
        for piece in engine.owned_slices()
        for kind, value in piece.values.items()
    }
    state |= {
        f"weight {name}": getattr(p, "ds_tensor", p).detach().clone() for name, p in engine.model.named_parameters()
    }
    counters = engine.engine_state()
    # fp16's scaler counts the refused step too, as it counts overflows; its scale must be what it was.
    state |= {f"counter {name}": torch.tensor(value) for name, value in counters.items() if name != "scaler_iter"}
    return state, {"skipped": skipped, "norms": norms}
