"""One process of a verification: the real engine over a few steps, and what it did, written down."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch

from megagpt.atomic import write_file
from megagpt.checkpoint.save import Identity, save_checkpoint
from megagpt.checkpoint.store import CheckpointStore
from megagpt.config.schema import TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.engine.engine import Engine, init_distributed
from megagpt.model.batch import TokenBatch
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.batches import TrainBatches
from megagpt.train.build import build_engine
from megagpt.train.schedule import lr_schedule
from megagpt.train.state import TrainState
from megagpt.verify.files import Files
from megagpt.verify.tokens import fingerprint

COLLECTIVE_TIMEOUT = timedelta(minutes=2)


@dataclass
class Seen:
    """What one process saw in one run."""

    data_parallel_rank: int
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    samples: list[list[list[str]]] = field(default_factory=list)
    """Fingerprints: step, micro-batch, row."""


def run_process(files: Files, rank: int, world_size: int) -> None:
    """All runs of a verification in the process of this rank, which the environment names as a launcher would."""
    torch.set_num_threads(1)
    configs = files.configs()
    init_distributed(COLLECTIVE_TIMEOUT, device_type="cpu")
    # One mesh for all: DeepSpeed keeps the first one's groups.
    mesh = make_mesh(rank, world_size, rank, torch.device("cpu"), next(iter(configs.values())).parallel)
    for name, config in configs.items():
        seen = _run(config, mesh, files, name)
        write_file(files.seen(name, rank), json.dumps(asdict(seen)).encode())
    mesh.barrier()
    torch.distributed.destroy_process_group()


def _run(config: TrainingRun, mesh: Mesh, files: Files, name: str) -> Seen:
    plan = plan_batches(config, mesh.world_size)
    engine = build_engine(config, plan, mesh)
    mixture = open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)
    batches = TrainBatches(mixture, plan, mesh)
    schedule = lr_schedule(config.optim, config.train.max_steps)
    seen = Seen(mesh.data_parallel_rank)
    state = TrainState()
    store = CheckpointStore(files.checkpoints(name))
    _save(engine, store, state, config)
    for step in range(config.train.max_steps):
        micro_batches = batches.step(step)
        seen.samples.append([_fingerprints(batch) for batch in micro_batches])
        outcome = engine.train_step(micro_batches, schedule(step))
        seen.losses.append(outcome.loss)
        seen.grad_norms.append(outcome.grad_norm)
        state = state.after_step(plan.tokens_per_step, skipped=outcome.skipped)
        if step == 0:
            _save(engine, store, state, config)
        if mesh.is_main:
            files.say(f"{name}: step {step + 1} of {config.train.max_steps}")
    return seen


def _fingerprints(batch: TokenBatch) -> list[str]:
    return [fingerprint(row) for row in batch.inputs.numpy()]


def _save(engine: Engine, store: CheckpointStore, state: TrainState, config: TrainingRun) -> None:
    plain = config.model_dump(mode="json")
    identity = Identity(config=plain, data_fingerprint=None, tokenizer=None, tokenizer_files=(), versions={})
    save_checkpoint(store, engine.mesh, engine.owned_slices(), state.to_dict(), identity)


def exit_code_of(files: Files, rank: int, world_size: int) -> int:
    """`run_process`; 1 where it fails, with the reason in a file of its own."""
    try:
        run_process(files, rank, world_size)
    except Exception as error:  # noqa: BLE001 - whatever it is, the table shall tell it
        text = " ".join(str(error).split()) or "no message"
        write_file(files.failure(rank), f"process {rank}: {type(error).__name__}: {text}".encode())
        raise_into_log(error)
        return 1
    return 0


def raise_into_log(error: BaseException) -> None:
    """The traceback, on standard error."""
    import traceback

    os.write(2, "".join(traceback.format_exception(error)).encode())
