"""The training loop. It decides when; how is in the engine, the schedule, the data and the store it is given."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
import xxhash

from megagpt.config.schema import TrainingRun
from megagpt.engine.engine import Engine, StepOutcome
from megagpt.engine.live import live_model
from megagpt.errors import TrainingDiverged
from megagpt.parallel.mesh import Mesh
from megagpt.train.batches import TrainBatches, ValidationBatches
from megagpt.train.benchmarks import Benchmarks, random_numbers_kept
from megagpt.train.metrics import Metrics
from megagpt.train.pace import Pace
from megagpt.train.policy import Event, Policy, Step
from megagpt.train.progress import ProgressLine
from megagpt.train.schedule import Schedule
from megagpt.train.skips import Ranges, batch_of, merged, passed, resumed
from megagpt.train.state import TrainState
from megagpt.train.watch import Watch


class StopFlag(Protocol):
    """True once this process was asked to stop."""

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""


class Saving(Protocol):
    """When checkpoints are due, and how one is made."""

    def is_due(self, step: int) -> bool:
        """Whether to save after this step. Every process asks, before it."""

    def settle(self) -> None:
        """Wait for a save under way."""

    def save(self, state: Mapping[str, Any], *, last: bool = False) -> None:
        """Save; the last time, return when it is durable."""


@dataclass(frozen=True, slots=True)
class Collaborators:
    """Everything the loop uses, made by `train.run` in the order a reader needs it."""

    engine: Engine
    batches: TrainBatches
    validation: ValidationBatches | None
    benchmarks: Benchmarks | None
    schedule: Schedule
    metrics: Metrics
    progress: ProgressLine
    stop: StopFlag
    saver: Saving
    restore: Callable[[], TrainState | None]
    """Put the engine back to the newest checkpoint; None where there is none."""
    watch: Watch
    event: Event
    mfu_per_token_rate: float | None
    """MFU for each token a second, where the peak is known."""


@dataclass
class _Progress:
    """What the loop changes as it goes."""

    state: TrainState
    skipped: Ranges
    """Batches that are passed over: those of the history and of the configuration."""
    rollbacks: Counter[int] = field(default_factory=Counter)
    """Checkpoint -> times that the run went back to it."""
    saves: bool = False
    """Whether a checkpoint follows the step in hand."""


def train(config: TrainingRun, state: TrainState, use: Collaborators) -> TrainState:
    """Run from `state` to `config.train.max_steps` optimizer steps, or until a signal.

    Raises:
        TrainingDiverged: loss or gradient norm is not finite on any rank, replicas differ, or spikes do not end; the
            last checkpoint stands.
    """
    at = _Progress(state, resumed(state.step, state.skipped_batches, config.train.skip_batches))
    try:
        return _train(config, at, use)
    except TrainingDiverged as error:
        use.watch.enter("save", at.state.step, "waiting for the save under way")  # whose time is not that of a step
        use.event("diverged", at.state.step, reason=str(error), **error.details)
        raise


def _train(config: TrainingRun, at: _Progress, use: Collaborators) -> TrainState:
    policy = Policy(config.watch, use.engine, use.event, use.progress.say)
    pace = Pace(use.engine.mesh, config.watch.slow_every)
    if at.state.step == 0:
        _evaluate(config, at.state, use)
        _score_benchmarks(at.state, use)
    while at.state.step < config.train.max_steps:
        outcome = _step(config, at, policy, pace, use)
        if policy.wants_rollback and _roll_back(at, policy, use):
            continue
        state = at.state
        if outcome.stop_requested:
            _save(at, use, last=True)
            _tell_stop(config, state, use)
            return state
        _evaluate_due(config, state, use)
        if at.saves:
            _save(at, use, last=state.step == config.train.max_steps)
    return at.state


def _evaluate_due(config: TrainingRun, state: TrainState, use: Collaborators) -> None:
    validation, benchmarks = _evaluations_due(config, state, use)
    if validation:
        _evaluate(config, state, use)
    if benchmarks:
        _score_benchmarks(state, use)


def _evaluations_due(config: TrainingRun, state: TrainState, use: Collaborators) -> tuple[bool, bool]:
    """Whether validation and benchmarks come after this step."""
    is_last = state.step == config.train.max_steps
    validation = use.validation is not None and (is_last or _due(state.step, config.eval.every))
    return validation, use.benchmarks is not None and (is_last or _due(state.step, config.eval.tasks_every))


def _tell_stop(config: TrainingRun, state: TrainState, use: Collaborators) -> None:
    """Whoever asks to stop may kill soon: the checkpoint comes first.

    Evaluations that are due at a step in the middle of the run are left out, and not made up for; those at its end
    would be missed for ever, and follow the checkpoint.
    """
    saved = f"asked to stop: saved at step {state.step}"
    if state.step == config.train.max_steps:
        use.progress.say(f"{saved}, the last one")
        _evaluate_due(config, state, use)
        return
    use.progress.say(f"{saved}; the same command goes on from there")
    for name, due in zip(("validation", "benchmarks"), _evaluations_due(config, state, use), strict=True):
        if due:
            use.progress.say(f"step {state.step}: {name} left out because of the stop; it is not made up for")


def _step(config: TrainingRun, at: _Progress, policy: Policy, pace: Pace, use: Collaborators) -> StepOutcome:
    """One optimizer step, whatever comes of it."""
    step, engine = at.state.step, use.engine
    use.watch.enter("step", step + 1, "reading data")
    started_at = time.perf_counter()
    at.saves = use.saver.is_due(step + 1) or step + 1 == config.train.max_steps
    batch = batch_of(step, at.skipped)
    _tell_passed(step, at.skipped, use)
    micro_batches = use.batches.step(batch)
    data_seconds = time.perf_counter() - started_at
    use.watch.enter("step", step + 1, "computing")

    def reseed() -> None:
        seed_random_numbers(config.run.seed, step, engine.mesh)

    reseed()
    lr = use.schedule(step)
    policy.begin(at.state.recent)
    outcome = engine.train_step(
        micro_batches,
        lr,
        stop=lambda: use.stop.requested,
        judge=policy.judge,
        together=policy.together,
        compare=at.saves or _due(step + 1, config.watch.replicas_every),
    )
    state = at.state.after_step(engine.plan.tokens_per_step, skipped=outcome.skipped)
    at.state = policy.end(state, outcome, Step(state.step, batch, micro_batches, lr, reseed))
    seconds = time.perf_counter() - started_at
    _record(at.state, outcome, lr, seconds, use)
    for slow in pace.note(data_seconds, engine.forward_seconds, seconds):
        use.event("slow_rank", state.step, **asdict(slow))
        use.progress.say(
            f"step {state.step}: rank {slow.rank} is {slow.times:.2f} times as slow as the others at {slow.part} "
            f"({slow.seconds * 1000:.3g} ms a step)"
        )
    return outcome


def _roll_back(at: _Progress, policy: Policy, use: Collaborators) -> bool:
    """Go back to the last checkpoint and pass over the batches from there to the spike; False where there is none.

    Source: Chowdhery et al. 2022 (PaLM), section 5.1: a checkpoint before the spike, and batches around it skipped.
    """
    spike = at.state.step
    use.watch.enter("save", spike, "going back to the last checkpoint")
    use.saver.settle()
    restored = use.restore()
    if restored is None:
        use.progress.say(f"step {spike}: no checkpoint to go back to yet")
        return False
    at.rollbacks[restored.step] += 1
    policy.check_rollbacks(at.rollbacks[restored.step], restored.step)
    batches = (batch_of(restored.step, at.skipped), batch_of(spike - 1, at.skipped) + 1)
    at.skipped = merged(at.skipped, [batches])
    at.state = replace(restored, skipped_batches=merged(restored.skipped_batches, [batches]))
    use.metrics.rewind(restored.step)
    use.event("rollback", spike, to_step=restored.step, skipped_batches=list(batches))
    use.progress.say(
        f"step {spike}: back to step {restored.step}; batches {batches[0]} to {batches[1] - 1} are passed over"
    )
    return True


def _tell_passed(step: int, skipped: Ranges, use: Collaborators) -> None:
    """The run comes to batches that it passes over."""
    if not skipped:
        return
    known = passed(step, skipped)
    for first, end in passed(step + 1, skipped)[len(known) :]:
        use.event("skipped_batches", step, batches=[first, end])
        use.progress.say(f"step {step}: batches {first} to {end - 1} are passed over")


def seed_random_numbers(seed: int, step: int, mesh: Mesh) -> None:
    """Random numbers (dropout) follow from seed, step and place alone, so that no generator state need be saved."""
    torch.manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{step}/{mesh.random_rank}".encode()) >> 1)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save(at: _Progress, use: Collaborators, *, last: bool) -> None:
    use.watch.enter("save", at.state.step, "comparing replicas")
    use.engine.check_replicas()
    use.watch.enter("save", at.state.step, "writing")
    skipped = merged(at.state.skipped_batches, passed(at.state.step, at.skipped))
    counters, rows = use.engine.engine_state(), use.metrics.rows
    state = replace(at.state, engine=counters, skipped_batches=skipped, metric_rows=rows)
    use.saver.save(state.to_dict(), last=last)


def _evaluate(config: TrainingRun, state: TrainState, use: Collaborators) -> None:
    if use.validation is None or not config.eval.every:
        return
    use.watch.enter("eval", state.step)
    started_at = time.perf_counter()
    loss, tokens = use.engine.eval_loss(use.validation)
    seconds = time.perf_counter() - started_at
    use.metrics.write({"step": state.step, "val_loss": loss, "val_tokens": tokens, "val_seconds": seconds})
    use.progress.say(f"step {state.step}: validation loss {loss:.4f} over {tokens:,} tokens")


def _score_benchmarks(state: TrainState, use: Collaborators) -> None:
    if use.benchmarks is None:
        return
    use.watch.enter("eval", state.step, "benchmarks")
    started_at = time.perf_counter()
    with random_numbers_kept(use.engine.mesh.device), live_model(use.engine) as model:
        found = use.benchmarks.score(state.step, model)
    seconds = time.perf_counter() - started_at
    use.metrics.write({"step": state.step, **found.values, "tasks_seconds": seconds})
    for line in found.lines:
        use.progress.say(f"step {state.step}: {line}")


def _record(state: TrainState, outcome: StepOutcome, lr: float, seconds: float, use: Collaborators) -> None:
    tokens_per_second = use.engine.plan.tokens_per_step / seconds
    row: dict[str, float | int | bool | None] = {
        "step": state.step,
        "loss": _finite(outcome.loss),
        "grad_norm": _finite(outcome.grad_norm),
        "lr": lr,
        "tokens": state.tokens,
        "tokens_per_second": tokens_per_second,
        "step_seconds": seconds,
    }
    if use.mfu_per_token_rate is not None:
        row["mfu"] = tokens_per_second * use.mfu_per_token_rate
    if outcome.loss_scale is not None:
        row |= {"loss_scale": use.engine.loss_scale, "skipped": outcome.skipped}
    elif outcome.skipped:
        row["skipped"] = True
    use.metrics.write(row)
    use.progress.step(state.step, outcome.loss, tokens_per_second)


def _finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None
