"""Scores over training steps: what evaluation during training found, and what the run's checkpoints scored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from evals import report_charts as charts
from evals.live_files import LiveEvaluation, LiveTask
from evals.report_scores import Score
from evals.stats import normal_interval

MOST_LINES = 6
"""Tasks of one chart."""

Interval = tuple[float, float] | None
Kind = Literal["metric", "bits per byte", "margin"]


@dataclass(frozen=True, slots=True)
class Curve:
    """One number of one task, measured in the same way at several steps."""

    task: str
    kind: Kind
    metric: str
    """Of the task; of `bits per byte` and `margin` what they are of: the right answer."""
    n: int
    n_total: int
    shots: int | None
    chance: float | None
    higher_is_better: bool
    steps: tuple[int, ...]
    values: tuple[float, ...]
    ci95: tuple[Interval, ...]
    truncated: int
    """Documents whose prompt lost its beginning, at the newest step."""

    @property
    def is_share(self) -> bool:
        """A score from 0 to 1 of which more is better."""
        return self.kind == "metric" and self.higher_is_better and all(0 <= value <= 1 for value in self.values)

    @property
    def name(self) -> str:
        """The metric; of a right answer what it is."""
        return self.metric if self.kind == "metric" else f"{self.metric}, {self.kind}"

    @property
    def label(self) -> str:
        """Of how many documents."""
        if self.kind != "metric":  # those with one right answer
            return f"{self.n:,} documents"
        return f"{self.n:,} of {self.n_total:,}" if self.n < self.n_total else f"all {self.n:,}"


@dataclass(frozen=True, slots=True)
class NotScored:
    """A task that the model in training could not answer."""

    task: str
    reason: str
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Live:
    """All that was measured during training."""

    curves: tuple[Curve, ...]
    not_scored: tuple[NotScored, ...]


def collect(evaluations: Sequence[LiveEvaluation]) -> Live:
    """Curves by task; other documents or shots (a setting was changed on the way) are another curve."""
    points: dict[tuple[str, Kind, str, int, int | None], list[tuple[int, LiveTask, float, Interval, bool]]] = {}
    failures: dict[tuple[str, str], list[int]] = {}
    for evaluation in evaluations:
        for task in evaluation.tasks:
            if task.status != "ok":
                failures.setdefault((task.task, task.reason), []).append(evaluation.step)
            for kind, metric, value, interval, is_better in _numbers(task):
                if math.isfinite(value):
                    key = (task.task, kind, metric, _n_of(task, kind), task.n_shots)
                    points.setdefault(key, []).append((evaluation.step, task, value, interval, is_better))
    curves = [
        Curve(
            task=name,
            kind=kind,
            metric=metric,
            n=n,
            n_total=found[-1][1].n_total,
            shots=shots,
            chance=found[-1][1].chance if kind == "metric" and metric.startswith("acc") else None,
            higher_is_better=found[-1][4],
            steps=tuple(step for step, *_ in found),
            values=tuple(value for _, _, value, _, _ in found),
            ci95=tuple(interval for _, _, _, interval, _ in found),
            truncated=found[-1][1].truncated,
        )
        for (name, kind, metric, n, shots), found in points.items()
    ]
    return Live(tuple(curves), tuple(NotScored(*key, tuple(steps)) for key, steps in failures.items()))


def step_charts(scores: Iterable[Score], live: Live) -> list[str]:
    """One small chart a task that has scores of several steps: the curve of training, and the checkpoints' points."""
    of_checkpoints: dict[str, dict[str, list[Score]]] = {}
    for score in scores:
        if score.is_share:
            of_checkpoints.setdefault(score.task, {}).setdefault(score.metric, []).append(score)
    of_training: dict[str, dict[str, list[Curve]]] = {}
    for curve in live.curves:
        if curve.is_share:
            of_training.setdefault(curve.task, {}).setdefault(curve.metric, []).append(curve)
    tasks = dict.fromkeys([*of_training, *of_checkpoints])
    return [
        drawn for task in tasks if (drawn := _task_chart(task, of_checkpoints.get(task, {}), of_training.get(task, {})))
    ]


def right_answer_charts(live: Live) -> list[str]:
    """How probable the right answers are over training: bits a byte, and the margin over the likeliest wrong one."""
    drawn = []
    for kind, title, y_label in (
        ("bits per byte", "Bits per byte of right answers", "lower is better"),
        ("margin", "Margin of right answers", "nats above wrong ones"),
    ):
        found = [curve for curve in live.curves if curve.kind == kind and len(curve.steps) > 1]
        parts = [found[start : start + MOST_LINES] for start in range(0, len(found), MOST_LINES)]
        for number, part in enumerate(parts, 1):
            several = f", {number} of {len(parts)}" if len(parts) > 1 else ""
            lines = [
                charts.StepLine(
                    f"{curve.task}, {curve.label}", curve.steps, curve.values, curve.ci95, color=charts.PALETTE[i]
                )
                for i, curve in enumerate(part)
            ]
            drawn.append(charts.step_chart(title + several, lines, y_label=y_label))
    return drawn


def _task_chart(task: str, of_checkpoints: dict[str, list[Score]], of_training: dict[str, list[Curve]]) -> str:
    """Empty where nothing has two steps."""
    lines: list[charts.StepLine] = []
    chances: list[float | None] = []
    is_trained = any(len(curve.steps) > 1 for curves in of_training.values() for curve in curves)
    for i, metric in enumerate(dict.fromkeys([*of_training, *of_checkpoints])):
        color = charts.PALETTE[i % MOST_LINES]
        for curve in of_training.get(metric, []):
            label = f"{metric}, {curve.label}, in training"
            lines.append(charts.StepLine(label, curve.steps, curve.values, curve.ci95, color=color))
            chances.append(curve.chance)
        found = sorted(of_checkpoints.get(metric, []), key=lambda score: score.step)
        if found and (is_trained or len(found) > 1):
            label = f"{metric}, checkpoints" if is_trained else metric
            bounds = [score.ci95 for score in found]
            steps, values = [score.step for score in found], [score.value for score in found]
            lines.append(charts.StepLine(label, steps, values, bounds, color=color, marked=True, joined=not is_trained))
            chances.append(found[-1].chance)
    steps_drawn = sorted({step for line in lines for step in line.x})
    if len(steps_drawn) < 2:
        return ""
    chance = next((value for value in chances if value is not None), None)
    return charts.step_chart(f"{task} by step", lines, chance=chance)


def _n_of(task: LiveTask, kind: Kind) -> int:
    return task.n if kind == "metric" or task.gold is None else task.gold.n


def _numbers(task: LiveTask) -> Iterable[tuple[Kind, str, float, Interval, bool]]:
    """(kind, metric, value, interval, whether higher is better)."""
    for name, metric in task.metrics.items():
        yield "metric", name, metric.value, metric.ci95, metric.higher_is_better
    gold = task.gold
    if gold is not None:
        bits = gold.bits_per_byte
        yield "bits per byte", "right answer", bits, _interval(bits, gold.bits_per_byte_stderr), False
        if gold.margin is not None:
            yield "margin", "right answer", gold.margin, _interval(gold.margin, gold.margin_stderr), True


def _interval(value: float, stderr: float | None) -> Interval:
    return None if stderr is None else normal_interval(value, stderr)
