"""What processes of a test do with an engine by itself: join, train on, save, restore."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.save import Identity, save_checkpoint
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import SliceReader
from megagpt.config.schema import TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.engine.engine import Engine, init_distributed
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.batches import TrainBatches
from megagpt.train.build import build_engine
from megagpt.train.schedule import lr_schedule
from megagpt.train.state import TrainState


def join(config: TrainingRun) -> Mesh:
    """This process's place among those of the test, on one thread of the CPU, where fp16 may run too."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True  # it only opens the door: the arithmetic is there
    torch.set_num_threads(1)
    init_distributed(timedelta(seconds=240), device_type="cpu")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return make_mesh(rank, world_size, rank, torch.device("cpu"), config.parallel)


def leave(mesh: Mesh) -> None:
    """When all are done."""
    mesh.barrier()
    torch.distributed.destroy_process_group()


def engine_for(config: TrainingRun, mesh: Mesh) -> Engine:
    return build_engine(config, plan_batches(config, mesh.world_size), mesh)


def train(engine: Engine, config: TrainingRun, state: TrainState, last: int) -> tuple[TrainState, list[float]]:
    """To step `last`: the state there, and the loss of each step."""
    mixture = open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)
    batches = TrainBatches(mixture, engine.plan, engine.mesh)
    schedule, losses = lr_schedule(config.optim, config.train.max_steps), []
    while state.step < last:
        outcome = engine.train_step(batches.step(state.step), schedule(state.step))
        state = state.after_step(engine.plan.tokens_per_step, skipped=outcome.skipped)
        losses.append(outcome.loss)
    return state, losses


def save(engine: Engine, config: TrainingRun, state: TrainState, folder: Path) -> None:
    """One checkpoint of ours, in a store at `folder`."""
    plain = config.model_dump(mode="json")
    identity = Identity(config=plain, data_fingerprint="", tokenizer=None, tokenizer_files=(), versions={})
    state = replace(state, engine=engine.engine_state())
    save_checkpoint(CheckpointStore(folder), engine.mesh, engine.owned_slices(), state.to_dict(), identity)


def restore(engine: Engine, step_dir: Path) -> tuple[TrainState, int]:
    """The state of the checkpoint, and how many bytes of values were read."""
    manifest = read_manifest(step_dir)
    state = TrainState.from_dict(manifest.state)
    with SliceReader(rank_files(step_dir, manifest)) as reader:
        engine.restore(reader, state.engine)
        return state, reader.bytes_read
