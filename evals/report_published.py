"""A run's scores beside published ones: of equal size, of equal compute, and over training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from evals import report_charts as charts
from evals.baselines import OURS, Baselines, Neighbours, PublishedScore, Trajectory, training_flops
from evals.report_inputs import RunFolder
from evals.report_scores import Score
from megagpt.model.flops import parameter_count

MOST_ROWS = 5
"""Of each kind in a table, the nearest in size."""

_FAMILY = re.compile(r"^(.*?)[- ](?=[\d.]+[MBT]\b|(?:Small|Medium|Large|XL)\b)")


@dataclass(frozen=True, slots=True)
class Published:
    """What one score of ours may be compared with."""

    score: Score
    parameters: int
    tokens: int | None
    flops: float | None
    """6ND, as of the published models."""
    neighbours: Neighbours
    trajectory: Trajectory | None
    ours_by_tokens: tuple[tuple[int, float], ...]
    """(tokens seen, score) of every checkpoint with this score."""


def published(run: RunFolder, scores: Sequence[Score], baselines: Baselines) -> list[Published]:
    """For every share of right answers of the newest step that something is published of."""
    if not scores:
        return []
    parameters = run_parameters(run)
    seen = tokens_by_step(run)
    last = max(score.step for score in scores)
    found = []
    for score in scores:
        if score.step != last or not score.is_share:
            continue
        tokens = seen.get(last)
        neighbours = baselines.neighbours(score.task, score.metric, score.shots, parameters=parameters, tokens=tokens)
        if not neighbours.comparable and not neighbours.not_comparable:
            continue
        ours = [
            (seen[other.step], other.value)
            for other in scores
            if (other.task, other.metric, other.shots) == (score.task, score.metric, score.shots)
            and seen.get(other.step)
        ]
        trajectory = baselines.trajectory(score.task, score.metric, score.shots, parameters)
        flops = None if tokens is None else training_flops(parameters, tokens)
        found.append(Published(score, parameters, tokens, flops, neighbours, trajectory, tuple(ours)))
    return found


def nothing_published(found: Sequence[Published], scores: Sequence[Score]) -> list[str]:
    """`task metric` of the newest step's shares of right answers that nothing at all is published of."""
    last = max((score.step for score in scores), default=None)
    known = {(one.score.task, one.score.metric) for one in found}
    names = [
        f"{s.task} {s.metric}" for s in scores if s.step == last and s.is_share and (s.task, s.metric) not in known
    ]
    return list(dict.fromkeys(names))


def definitions_of(found: Sequence[Published], baselines: Baselines) -> dict[str, str]:
    """What the definitions mean that rows stand apart for."""
    named = {score.definition for one in found for score, _ in one.neighbours.nearest_apart} - {OURS}
    return {name: baselines.definitions[name] for name in sorted(named)}


def run_parameters(run: RunFolder) -> int:
    """All parameters of the run's model."""
    planned = (run.plan or {}).get("parameters")
    return planned if isinstance(planned, int) else parameter_count(run.config.model)


def tokens_by_step(run: RunFolder) -> dict[int, int]:
    """Step -> tokens trained on until then, as far as metrics.jsonl says."""
    known = {row["step"]: int(row["tokens"]) for row in run.train_rows if row.get("tokens") is not None}
    return {0: 0, **known}


def published_charts(found: Sequence[Published]) -> list[list[str]]:
    """Of each: score over parameters, and over tokens where several checkpoints were scored."""
    charts_of_all = []
    for one in found:
        drawn: list[str] = []
        charts_of_all.append(drawn)
        name = f"{one.score.task} {one.score.metric}, {one.score.shots}-shot"
        if one.neighbours.comparable:
            ours = charts.Bar("this run", one.score.value, one.score.ci95, one.score.chance)
            drawn.append(
                charts.size_chart(
                    name, _families(one.neighbours.comparable), ours, one.parameters, y_label=one.score.metric
                )
            )
        if one.trajectory is not None and len(one.ours_by_tokens) > 1:
            points = [(t, v) for t, v in zip(one.trajectory.tokens(), one.trajectory.values, strict=True) if t > 0]
            lines = [
                charts.Line(
                    "this run", *_columns([(t, v) for t, v in one.ours_by_tokens if t > 0]), charts.BLUE, points=True
                ),
                charts.Line(one.trajectory.model.name, *_columns(points), charts.VERMILLION, dashed=True),
            ]
            drawn.append(
                charts.line_chart(
                    f"{name}, over training",
                    lines,
                    y_label=one.score.metric,
                    x_scale="log",
                    size=(4.4, 3.0),
                    x_label="tokens",
                )
            )
    return charts_of_all


def sources_of(found: Sequence[Published], baselines: Baselines) -> dict[str, str]:
    """The sources of all rows that the tables show, by their short names."""
    shown = [
        row.source
        for one in found
        for rows in (one.neighbours.equal_parameters, one.neighbours.equal_compute, (one.neighbours.nearest,))
        for row in rows[:MOST_ROWS]
        if row is not None
    ]
    shown += [row.source for one in found for row, _ in one.neighbours.nearest_apart]
    return {name: baselines.sources[name] for name in sorted(set(shown))}


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _families(scores: Sequence[PublishedScore]) -> list[charts.Family]:
    """Models of one name but for the size, by size."""
    members: dict[str, list[PublishedScore]] = {}
    for score in scores:
        match = _FAMILY.match(score.model.name)
        members.setdefault(match[1] if match else score.model.name, []).append(score)
    return [
        charts.Family(name, [score.model.parameters for score in found], [score.value for score in found])
        for name, found in sorted(members.items())
    ]
