"""Several engines one after the other in one group of processes: what each layout did, as plain numbers."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.save import Identity, save_checkpoint
from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.checkpoint.tensors import SliceReader
from megagpt.config.schema import TrainingRun
from megagpt.engine.engine import Engine, init_distributed
from megagpt.errors import TrainingDiverged
from megagpt.model.batch import TokenBatch
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.batches import TrainBatches, ValidationBatches
from megagpt.train.build import build_engine
from megagpt.train.schedule import lr_schedule
from megagpt.train.state import TrainState
from tests.distributed.guards import without


@dataclass(frozen=True)
class Job:
    """One engine: where it starts, how far it goes, where it saves."""

    name: str
    config: TrainingRun
    steps: int
    """The step to stop before."""
    load: Path | None = None
    """A published checkpoint to start from; it is waited for."""
    save_loaded: Path | None = None
    """Folder of a store to save into at once after loading."""
    save: Path | None = None
    """Folder of a store to save into at the end."""
    save_first: Path | None = None
    """Folder of a store to save into after the first step, or the first few."""
    first_steps: int = 1
    validate: int | None = None
    """At the end, evaluate over so many sequences of `data.val`."""
    without: str | None = None
    """One of `guards.GUARDS`, switched off."""
    miscounted: int = 0
    """Micro-batches that DeepSpeed believes to have seen before the first one."""
    swap_micro_batch: int | None = None
    """In every step, take the next step's micro-batch of this index instead of one's own."""


@dataclass
class Measured:
    """What one job showed on rank 0."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    loss_scales: list[float | None] = field(default_factory=list)
    engine_state: dict[str, float] = field(default_factory=dict)
    validation: list[float] = field(default_factory=list)
    optimizer: str = ""
    samples: list[str] = field(default_factory=list)
    """A hash of each step's samples in their order, over all processes."""
    diverged: str | None = None
    """What ended the run before its last step."""
    differing: str | None = None
    """What the comparison of replicas said at the end."""


def run_jobs(jobs: list[Job], out: Path) -> None:
    """In every process of a group: run the jobs in turn; rank 0 writes what they showed."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True  # it only opens the door: the arithmetic is there
    torch.set_num_threads(1)
    init_distributed(timedelta(seconds=120), device_type="cpu")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    parallel = jobs[0].config.parallel  # one mesh a group of processes: DeepSpeed keeps the first
    mesh = make_mesh(rank, world_size, rank, torch.device("cpu"), parallel)
    assert all((job.config.parallel.tensor, job.config.parallel.pipeline, job.config.parallel.sequence)
               == (mesh.tensor, mesh.pipeline, mesh.sequence) for job in jobs)  # fmt: skip
    measured = {}
    for job in jobs:
        with without(job.without):
            measured[job.name] = _run_job(job, mesh)
    if mesh.is_main:
        out.write_text(json.dumps({name: vars(value) for name, value in measured.items()}))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def read_measured(out: Path) -> dict[str, Measured]:
    return {name: Measured(**values) for name, values in json.loads(out.read_text()).items()}


def _run_job(job: Job, mesh: Mesh) -> Measured:
    plan = plan_batches(job.config, mesh.world_size)
    engine = build_engine(job.config, plan, mesh)
    engine._engine.micro_steps += job.miscounted
    state = _load(job, engine)
    if job.save_loaded is not None:
        _save(job, job.save_loaded, engine, state)
    measured = Measured(optimizer=engine.optimizer_class)
    try:
        state = _train(job, engine, state, measured)
    except TrainingDiverged as error:
        measured.diverged = str(error)
        return measured
    measured.engine_state = engine.engine_state()
    if job.validate is not None:
        validation = ValidationBatches(job.config.data.val, job.validate, plan, mesh)
        measured.validation = list(engine.eval_loss(validation))
    try:
        engine.check_replicas()
    except TrainingDiverged as error:
        measured.differing = str(error)
    if job.save is not None:
        _save(job, job.save, engine, state)
    return measured


def _train(job: Job, engine: Engine, state: TrainState, measured: Measured) -> TrainState:
    plan, mesh = engine.plan, engine.mesh
    batches = TrainBatches(_mixture(job.config), plan, mesh)
    schedule = lr_schedule(job.config.optim, job.config.train.max_steps)
    while state.step < job.steps:
        micro_batches = batches.step(state.step)
        if job.swap_micro_batch is not None:
            micro_batches[job.swap_micro_batch] = batches.step(state.step + 1)[job.swap_micro_batch]
        outcome = engine.train_step(micro_batches, schedule(state.step))
        state = state.after_step(plan.tokens_per_step, skipped=outcome.skipped)
        if job.save_first is not None and len(measured.losses) + 1 == job.first_steps:
            _save(job, job.save_first, engine, state)
        measured.samples.append(_hash_of_samples(micro_batches, mesh))
        measured.losses.append(outcome.loss)
        measured.grad_norms.append(outcome.grad_norm)
        measured.skipped.append(outcome.skipped)
        measured.loss_scales.append(outcome.loss_scale)
    return state


def _hash_of_samples(micro_batches: list[TokenBatch], mesh: Mesh) -> str:
    own = (mesh.data_parallel_rank, [batch.inputs.numpy().tobytes() for batch in micro_batches])
    by_rank = dict(mesh.gather(own))
    in_order = [by_rank[rank][micro] for micro in range(len(micro_batches)) for rank in sorted(by_rank)]
    return hashlib.sha256(b"".join(in_order)).hexdigest()


def _mixture(config: TrainingRun):
    from megagpt.data.mixture import open_mixture

    return open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)


def _load(job: Job, engine: Engine) -> TrainState:
    if job.load is None:
        return TrainState()
    until = time.monotonic() + 200
    while not job.load.exists():  # another group writes it
        if time.monotonic() > until:
            raise TimeoutError(f"{job.load} did not appear")
        time.sleep(0.1)
    manifest = verify_checkpoint(job.load)
    state = TrainState.from_dict(manifest.state)
    with SliceReader(rank_files(job.load, manifest)) as reader:
        engine.restore(reader, state.engine)
    return state


def _save(job: Job, folder: Path, engine: Engine, state: TrainState) -> None:
    from dataclasses import replace

    plain = job.config.model_dump(mode="json")
    identity = Identity(config=plain, data_fingerprint="", tokenizer=None, tokenizer_files=(), versions={})
    state = replace(state, engine=engine.engine_state())
    save_checkpoint(CheckpointStore(folder), engine.mesh, engine.owned_slices(), state.to_dict(), identity)
