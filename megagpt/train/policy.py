"""What becomes of a step whose loss or gradient is not finite (`watch.on_nonfinite`) or a spike (`watch.on_spike`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megagpt.config.schema import WatchSection
from megagpt.engine.engine import Engine, StepOutcome
from megagpt.engine.inspect import NonFinite
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
        is_fp16 = outcome.loss_scale is not None
        if not math.isfinite(outcome.loss) or not (math.isfinite(outcome.grad_norm) or is_fp16):
            self._not_finite(outcome, step, state.refused_in_a_row + 1)
            return replace(state, refused_in_a_row=state.refused_in_a_row + 1)
        refused = outcome.skipped and math.isfinite(outcome.grad_norm)
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

    def _not_finite(self, outcome: StepOutcome, step: Step, in_a_row: int) -> None:
        what = "loss" if not math.isfinite(outcome.loss) else "gradient norm"
        value = outcome.loss if what == "loss" else outcome.grad_norm
        found = self._engine.blame() if what == "loss" else self._inspect(step)
        details = self._details(what, found, step)
        skips = self._watch.on_nonfinite == "skip"
        goes_on = skips and in_a_row <= self._watch.max_skips
        self._event("nonfinite", step.number, action="skip" if goes_on else "stop", **details)
        words = f"{what} is {value}{self._whose(found, details)}"
        if goes_on:
            self._say(f"step {step.number}: {words}; the step made no update")
            return
        why = f", number {in_a_row} in a row (watch.max_skips is {self._watch.max_skips})" if skips else ""
        error = TrainingDiverged(
            f"{words}{why}; step {step.number} was not saved and the last checkpoint stands. "
            "Lower optim.lr, lengthen optim.warmup_steps, or look at the data of this step"
        )
        error.details = {"what": what, "ranks": details["ranks"]}
        raise error

    def _inspect(self, step: Step) -> list[NonFinite]:
        step.reseed()
        return self._engine.inspect_step(step.micro_batches, step.lr)

    def _details(self, what: str, found: Sequence[NonFinite], step: Step) -> dict[str, Any]:
        plan = self._engine.plan
        samples: dict[int, list[int]] = {}
        for one in found:
            ranges = plan.sample_indices(step.batch, one.data_parallel_rank)
            chosen = one.micro_batches or range(len(ranges))
            own = samples.setdefault(one.rank, [])
            own += [index for micro in chosen for index in ranges[micro] if index not in own]
        details: dict[str, Any] = {
            "what": what,
            "batch": step.batch,
            "ranks": sorted(samples),
            "samples": {str(rank): indices for rank, indices in sorted(samples.items())},
        }
        names = list(dict.fromkeys(name for one in found for name in one.names))
        return details | ({"parameters": names} if names else {})

    def _whose(self, found: Sequence[NonFinite], details: dict[str, Any]) -> str:
        if not found:
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
