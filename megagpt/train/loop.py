"""The training loop. It decides when; how is in the engine, the schedule, the data and the store it is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import xxhash

from megagpt.config.schema import TrainingRun
from megagpt.engine.engine import Engine, StepOutcome
from megagpt.parallel.mesh import Mesh
from megagpt.train.batches import TrainBatches, ValidationBatches
from megagpt.train.metrics import Metrics
from megagpt.train.progress import ProgressLine
from megagpt.train.schedule import Schedule
from megagpt.train.state import TrainState


class StopFlag(Protocol):
    """True once this process was asked to stop."""

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""


@dataclass(frozen=True, slots=True)
class Collaborators:
    """Everything the loop uses, made by `train.run` in the order a reader needs it."""

    engine: Engine
    batches: TrainBatches
    validation: ValidationBatches | None
    schedule: Schedule
    metrics: Metrics
    progress: ProgressLine
    stop: StopFlag
    save: Callable[[TrainState], None]
    mfu_per_token_rate: float | None
    """MFU for each token a second, where the peak is known."""


def train(config: TrainingRun, state: TrainState, use: Collaborators) -> TrainState:
    """Run from `state` to `config.train.max_steps` optimizer steps, or until a signal.

    Raises:
        TrainingDiverged: loss or gradient norm is not finite on any rank; the last checkpoint stands.
    """
    if state.step == 0:
        _evaluate(config, state, use)
    saved_at = state.step
    while state.step < config.train.max_steps:
        started_at = time.perf_counter()
        seed_random_numbers(config.run.seed, state.step, use.engine.mesh)
        lr = use.schedule(state.step)
        outcome = use.engine.train_step(use.batches.step(state.step), lr, stop=use.stop.requested)
        state = state.after_step(use.engine.plan.tokens_per_step, skipped=outcome.skipped)
        _record(state, outcome, lr, time.perf_counter() - started_at, use)
        if state.step == config.train.max_steps or _due(state.step, config.eval.every):
            _evaluate(config, state, use)
        if outcome.stop_requested or _due(state.step, config.checkpoint.save_every):
            _save(state, use)
            saved_at = state.step
        if outcome.stop_requested:
            use.progress.say(f"asked to stop: saved at step {state.step}; the same command goes on from there")
            return state
    if saved_at != state.step:
        _save(state, use)
    return state


def seed_random_numbers(seed: int, step: int, mesh: Mesh) -> None:
    """Random numbers (dropout) follow from seed, step and place alone, so that no generator state need be saved."""
    torch.manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{step}/{mesh.random_rank}".encode()) >> 1)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(state: TrainState, use: Collaborators) -> None:
    use.engine.check_replicas()
    use.save(replace(state, engine=use.engine.engine_state()))


def _evaluate(config: TrainingRun, state: TrainState, use: Collaborators) -> None:
    if use.validation is None or not config.eval.every:
        return
    started_at = time.perf_counter()
    loss, tokens = use.engine.eval_loss(use.validation)
    seconds = time.perf_counter() - started_at
    use.metrics.write({"step": state.step, "val_loss": loss, "val_tokens": tokens, "val_seconds": seconds})
    use.progress.say(f"step {state.step}: validation loss {loss:.4f} over {tokens:,} tokens")


def _record(state: TrainState, outcome: StepOutcome, lr: float, seconds: float, use: Collaborators) -> None:
    tokens_per_second = use.engine.plan.tokens_per_step / seconds
    row: dict[str, float | int | bool | None] = {
        "step": state.step,
        "loss": outcome.loss,
        "grad_norm": None if outcome.skipped else outcome.grad_norm,
        "lr": lr,
        "tokens": state.tokens,
        "tokens_per_second": tokens_per_second,
        "step_seconds": seconds,
    }
    if use.mfu_per_token_rate is not None:
        row["mfu"] = tokens_per_second * use.mfu_per_token_rate
    if outcome.loss_scale is not None:
        row |= {"loss_scale": outcome.loss_scale, "skipped": outcome.skipped}
    use.metrics.write(row)
    use.progress.step(state.step, outcome.loss, tokens_per_second)
