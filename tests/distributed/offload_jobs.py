"""What the processes of test_offload.py do beside running engines as they are."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch

from megagpt.config.schema import TrainingRun
from megagpt.engine.accounting import TensorAccounting
from megagpt.engine.engine import init_distributed
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.build import build_engine


def zero_0_in_bf16(out: Path) -> None:
    """How many updates Adam has made under ZeRO-0 before the first step, and what they did to a weight."""
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


def construct(large: dict[str, TrainingRun], small: list[TrainingRun], folder: Path) -> None:
    """Make engines, and write what that took and what came of it.

    Writes:
        `peaks.json`: for each of `large`, most bytes of tensors at a time until each process had its initial weights.
        `RANK-INDEX.pt`: this process's part of each weight of the small models.
    """
    rank, world_size = join()
    mesh = make_mesh(rank, world_size, rank, torch.device("cpu"), next(iter(large.values())).parallel)
    peaks = {name: mesh.gather(_peak_bytes(config, mesh)) for name, config in large.items()}
    for index, config in enumerate(small):
        model = build_engine(config, plan_batches(config, world_size), mesh).model
        parts = {name: parameter.ds_tensor.clone() for name, parameter in model.named_parameters()}
        torch.save(parts, folder / f"{rank}-{index}.pt")
    if mesh.is_main:
        (folder / "peaks.json").write_text(json.dumps(peaks))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def join() -> tuple[int, int]:
    torch.set_num_threads(1)
    init_distributed(timedelta(seconds=120), device_type="cpu")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _peak_bytes(config: TrainingRun, mesh: Mesh) -> int:
    """Most bytes of tensors that were alive at once, beside those that were there before, until DeepSpeed's start."""

    class WeightsAreThereError(Exception):
        pass

    def stop(*args: object, **named: object) -> None:
        raise WeightsAreThereError

    with TensorAccounting(dict) as accounting:
        before = accounting.live_bytes
        with patch.object(deepspeed, "initialize", stop), suppress(WeightsAreThereError):
            build_engine(config, plan_batches(config, mesh.world_size), mesh)
        return accounting.peak_bytes - before
