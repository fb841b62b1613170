"""What the processes of test_disk.py do beside running engines as they are."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import torch

from megagpt.config.schema import TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.engine.disk import ScratchFile
from megagpt.errors import MegaGPTError
from megagpt.parallel.mesh import make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.batches import TrainBatches
from megagpt.train.build import build_engine
from tests.distributed.offload_jobs import join

N = 2**18 + 17
"""Elements: no multiple of any block."""
MISALIGNED = 37
"""Elements before what is read, which begins at no multiple of 512 bytes."""
LIMIT = 2**20
"""Bytes that a file may have, in place of a full disk."""


def look_at_state(config: TrainingRun, out: Path) -> None:
    """Two steps; then what of the optimizer's state lies where."""
    rank, world_size = join()
    mesh = make_mesh(rank, world_size, rank, torch.device("cpu"), config.parallel)
    plan = plan_batches(config, world_size)
    engine = build_engine(config, plan, mesh)
    mixture = open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)
    for step in range(2):
        engine.train_step(TrainBatches(mixture, plan, mesh).step(step), 1e-3)
    optimizer = engine._engine.optimizer
    flats = optimizer.fp32_partitioned_groups_flat
    states = [optimizer.optimizer.state[flat] for flat in flats]
    scratch = optimizer.optimizer_swapper.aio_handle
    found = {
        "numels": [int(numel) for numel in optimizer.fp16_partitioned_groups_flat_numel],
        "weights": [flat.numel() for flat in flats],
        "moments": [[state[kind].numel() for kind in ("exp_avg", "exp_avg_sq")] for state in states],
        "on_disk": 512 * os.fstat(scratch._descriptor).st_blocks,
        "links": os.fstat(scratch._descriptor).st_nlink,
    }
    if mesh.is_main:
        out.write_text(json.dumps(found))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def move_through(whose: str, folder: Path, out: Path) -> None:
    """Write and read where the system refuses: memory that is not aligned, and a file that may not grow.

    Writes:
        {"aligned", "misaligned": whether what was read is what was written; "full": what writing too much raised}
    """
    if whose == "ours":
        handle = ScratchFile(folder)
    else:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        handle = AsyncIOBuilder().load().aio_handle(block_size=2**20)
    path = str(folder / "values")
    written, buffer = (handle.new_cpu_locked_tensor(4 * N, torch.zeros(1)) for _ in range(2))
    written.copy_(torch.arange(4.0 * N))
    found: dict[str, object] = {"begun": handle.async_pwrite(written[: N - 17], path, 0), "done": handle.wait()}
    for name, start in (("aligned", 0), ("misaligned", MISALIGNED)):
        into = buffer.fill_(-1)[start : start + N - 17]
        handle.async_pread(into, path, 0)
        handle.wait()
        found[name] = torch.equal(into, written[: N - 17])
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
    found["full"] = None
    try:
        handle.async_pwrite(written[: 4 * (N - 17)], str(folder / "more"), 0)
        handle.wait()
    except (MegaGPTError, OSError) as error:
        found["full"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    out.write_text(json.dumps(found))
    os._exit(0)  # DeepSpeed's op may not come down in order
