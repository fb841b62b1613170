"""What becomes of a step whose loss or gradient is not finite (`watch.on_nonfinite`) or a spike (`watch.on_spike`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megagpt.config.schema import WatchSection
from megagpt.engine.engine import Engine, StepOutcome
from megagpt.engine.inspect import Inspection, NonFinite
from megagpt.errors import TrainingDiverged
from megagpt.model.batch import TokenBatch
from megagpt.train.spikes import SpikeRule, Window
from megagpt.train.state import TrainState

Event = Callable[..., None]
"""(name, step, **details): into the run's history, on the main process; nothing on the others."""

_NAMED = 3
"""Ranks, parameters and samples that a message names; the run's history has all."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step in hand, as it can be computed again."""

    number: int
    """1-based: the state's after it."""
    batch: int
    micro_batches: Sequence[TokenBatch]
    lr: float
    reseed: Callable[[], None]
    """Gives the random numbers of the step again."""


@dataclass(frozen=True, slots=True)
class _Trouble:
    """What is not finite in a step."""

    what: str
    value: float
    found: list[NonFinite]
    """Where it began; nowhere where each process's own values were finite when they were computed again."""
    again: bool = False
    """Whether it was not finite then either."""
    overflows_at: float | None = None
    """fp16: a loss scale that cannot be lowered, and is all that is wrong."""

    @property
    def advice(self) -> str:
        """For the person who comes to mend it."""
        if self.overflows_at is not None:
            return "Lower parallel.extra.fp16.loss_scale or parallel.extra.fp16.min_loss_scale, whichever is set"
        return "Lower optim.lr, lengthen optim.warmup_steps, or look at the data of this step"


class Policy:
    """Judges every step before its update, and says what happened.

    Args:
        watch: the rules.
        engine: of this process.
        event: see above.
        say: a line for a person.
    """

    def __init__(self, watch: WatchSection, engine: Engine, event: Event, say: Callable[[str], None]) -> None:
        self._watch, self._engine, self._event, self._say = watch, engine, event, say
        self._rule = SpikeRule(watch.spike_sigmas, watch.spike_window)
        self._spike = ""
        self._recent: Window = ()
        self.together = watch.on_spike != "record" or watch.on_nonfinite == "skip"
        """Whether processes must agree before an update."""
        self.wants_rollback = False
        """Whether the step that has just ended is to be undone."""

    def begin(self, recent: Window) -> None:
        """A step begins after these."""
        self._recent, self._spike, self.wants_rollback = recent, "", False

    def judge(self, loss: float, grad_norm: float) -> bool:
        """For the engine: whether a step with these finite values makes its update."""
        self._spike = self._rule.judge(self._recent, loss, grad_norm)
        return not self._spike or self._watch.on_spike == "record"

    def end(self, state: TrainState, outcome: StepOutcome, step: Step) -> TrainState:
        """Tell what happened in a step, and count it. All processes call it.

        Args:
            state: after the step, as `TrainState.after_step` gives it.
            outcome: of the step.
            step: to compute it again where it is not finite.

        Raises:
            TrainingDiverged: on all processes together: not finite and the policy is to stop, or too many in a row.
        """
        if not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)):
            trouble = self._trouble(outcome, step)
            if trouble is None:  # neither an update nor a refusal
                return state
            self._not_finite(step, trouble, state.refused_in_a_row + 1)
            return replace(state, refused_in_a_row=state.refused_in_a_row + 1)
        refused = outcome.skipped
        if not refused:  # a spike that was dropped is no measure for the next one
            state = replace(state, recent=self._rule.added(state.recent, outcome.loss, outcome.grad_norm))
        if refused or self._spike:
            self._tell_spike(outcome, step, refused=refused)
        in_a_row = state.refused_in_a_row + 1 if refused else 0
        if in_a_row > self._watch.max_skips:
            raise self._too_many(f"step {step.number} is spike number {in_a_row} in a row")
        self.wants_rollback = refused and self._watch.on_spike == "rollback"
        return replace(state, refused_in_a_row=in_a_row)

    def check_rollbacks(self, count: int, step: int) -> None:
        """Refuse to go back to the same checkpoint once more.

        Raises:
            TrainingDiverged: after `watch.max_skips` rollbacks to it.
        """
        if count > self._watch.max_skips:
            raise self._too_many(f"a spike follows for the {count}th time after going back to step {step}")

    def _tell_spike(self, outcome: StepOutcome, step: Step, *, refused: bool) -> None:
        action = self._watch.on_spike if refused else "record"
        words = self._spike or "another rank sees a spike"
        self._event(
            "spike",
            step.number,
            reason=words,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            batch=step.batch,
            action=action,
        )
        done = {"record": "", "skip": "; the step made no update", "rollback": "; the step is undone"}[action]
        self._say(f"step {step.number}: spike: {words}{done}")

    def _trouble(self, outcome: StepOutcome, step: Step) -> _Trouble | None:
        """What is not finite in a step, and where it began; None for an overflow, which a smaller loss scale mends.

        fp16: an overflow is what is finite when computed once more with a loss scale of 1. NaN and infinity alone do
        not tell: sums of overflows are NaN too.
        """
        if not math.isfinite(outcome.loss):  # no scale has touched it
            return _Trouble("loss", outcome.loss, self._engine.blame())
        overflows_at: float | None = None
        if outcome.loss_scale is None:
            again = self._inspect(step)
        else:
            again = self._inspect(step, unscaled=True)
            if again.is_finite and outcome.scale_can_fall:
                return None
            self._engine.take_back_loss_scale()
            if again.is_finite:
                again = self._inspect(step)
                overflows_at = None if again.is_finite else self._engine.loss_scale
        return _Trouble("gradient norm", outcome.grad_norm, again.found, not again.is_finite, overflows_at)

    def _not_finite(self, step: Step, trouble: _Trouble, in_a_row: int) -> None:
        details = self._details(trouble, step)
        skips = self._watch.on_nonfinite == "skip"
        goes_on = skips and in_a_row <= self._watch.max_skips
        self._event("nonfinite", step.number, action="skip" if goes_on else "stop", **details)
        words = f"{trouble.what} is {trouble.value}{self._whose(trouble, details)}"
        if goes_on:
            self._say(f"step {step.number}: {words}; the step made no update")
            return
        why = f", number {in_a_row} in a row (watch.max_skips is {self._watch.max_skips})" if skips else ""
        error = TrainingDiverged(
            f"{words}{why}; step {step.number} was not saved and the last checkpoint stands. {trouble.advice}"
        )
        error.details = {"what": trouble.what, "ranks": details["ranks"]}
        raise error

    def _inspect(self, step: Step, *, unscaled: bool = False) -> Inspection:
        step.reseed()
        return self._engine.inspect_step(step.micro_batches, step.lr, unscaled=unscaled)

    def _details(self, trouble: _Trouble, step: Step) -> dict[str, Any]:
        plan = self._engine.plan
        samples: dict[int, list[int]] = {}
        for one in trouble.found:
            ranges = plan.sample_indices(step.batch, one.data_parallel_rank)
            chosen = one.micro_batches or range(len(ranges))
            own = samples.setdefault(one.rank, [])
            own += [index for micro in chosen for index in ranges[micro] if index not in own]
        details: dict[str, Any] = {
            "what": trouble.what,
            "batch": step.batch,
            "ranks": sorted(samples),
            "samples": {str(rank): indices for rank, indices in sorted(samples.items())},
        }
        names = list(dict.fromkeys(name for one in trouble.found for name in one.names))
        scale = {"loss_scale": trouble.overflows_at} if trouble.overflows_at is not None else {}
        return details | ({"parameters": names} if names else {}) | scale

    def _whose(self, trouble: _Trouble, details: dict[str, Any]) -> str:
        if trouble.overflows_at is not None:
            return f" by the loss scale of {trouble.overflows_at:g}; with a loss scale of 1 it is finite"
        if not trouble.found and trouble.again:
            return " (what each rank computes is finite, and the sum over ranks is not)"
        if not trouble.found:
            return " (computed again it is finite on every rank: look at the memory and the devices of the hosts)"
        ranks = ", ".join(f"rank {rank}" for rank in details["ranks"][:_NAMED])
        (first, *_), indices = details["ranks"], details["samples"]
        of_first = indices[str(first)]
        shown = ", ".join(map(str, of_first[:_NAMED])) + (", ..." if len(of_first) > _NAMED else "")
        parameters = ", ".join(details.get("parameters", ())[:_NAMED])
        return f" on {ranks} (samples {shown} of rank {first}{'; in ' + parameters if parameters else ''})"

    def _too_many(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what}, and watch.max_skips is {self._watch.max_skips}; the last checkpoint stands. Lower optim.lr, look "
            "at the data from there on (train.skip_batches passes over some), or raise watch.spike_sigmas"
        )
