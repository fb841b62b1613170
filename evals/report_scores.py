"""Scores with all that is needed to believe them, and their charts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import report_charts as charts
from evals.caveats import caveats, is_mostly_cut
from evals.report_inputs import StepEvals
from evals.results import Metric, TaskResult
from evals.sample_files import DocumentScores, Row, document_scores, with_clustered_intervals
from evals.stats import normal_interval, wilson_interval

_HASH_CHARACTERS = 12


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task at one step."""

    step: int
    task: str
    metric: str
    value: float
    ci95: tuple[float, float] | None
    method: str
    """How the interval was made; empty without one."""
    stderr: float | None
    chance: float | None
    higher_is_better: bool
    n: int
    n_total: int
    shots: int | None
    """None where the tasks of a group differ."""
    limit: int | None
    truncated: int
    version: str
    prompts: str
    """Hash over all prompts, so that two scores of equal ones can be told; empty where they were not kept."""
    origin: str
    seconds: float
    weights: str
    dtype: str
    """Empty where the file does not say."""
    max_seq_len: int | None
    batch_invariant: bool | None
    environment: dict[str, Any]
    """What computed it: torch, device, code; empty in files of older versions."""
    absent_splits: tuple[str, ...]
    told: tuple[str, ...]
    """What to know beside the number."""

    @property
    def device(self) -> str:
        """What computed it; a dash where the file does not say."""
        named = (self.environment.get("device"), self.environment.get("device_name"))
        return ", ".join(str(name) for name in named if name) or "-"

    @property
    def is_mostly_cut(self) -> bool:
        """Whether most prompts lost their beginning."""
        return is_mostly_cut(self.truncated, self.n)

    @property
    def is_share(self) -> bool:
        """A score from 0 to 1 of which more is better: what has a place on a common axis."""
        return self.higher_is_better and 0 <= self.value <= 1


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A task that could not be run."""

    step: int
    task: str
    reason: str


@dataclass(frozen=True, slots=True)
class Subjects:
    """A group's score by task, over the evaluated steps: the heat map."""

    group: str
    metric: str
    chance: float | None
    steps: tuple[int, ...]
    rows: tuple[tuple[str, int, tuple[float | None, ...]], ...]
    """(task, documents at the last step, score at each step), best first."""


def score_rows(step: int, measured: TaskResult, rows: Sequence[Row]) -> list[Score]:
    """One row a metric.

    Args:
        step: of the checkpoint.
        measured: of a task that could be run.
        rows: its answers; none where they were not kept.
    """
    result = with_clustered_intervals(measured, rows)  # of a result that an older version wrote, too
    by_document = document_scores(result, rows)
    prompts, told = prompts_hash(rows), caveats(result)
    return [
        Score(
            step=step,
            task=result.task,
            metric=name,
            value=metric.value,
            **_uncertainty(metric, result.n, by_document.get(name)),
            chance=result.chance if name.startswith("acc") else None,
            higher_is_better=metric.higher_is_better,
            n=result.n,
            n_total=result.n_total,
            shots=result.n_shots,
            limit=result.settings.get("limit"),
            truncated=result.truncated,
            version=result.task_version or "",
            prompts=prompts,
            origin=_origin(result),
            seconds=result.seconds,
            weights=str(result.checkpoint.get("hash", "")),
            dtype=str(result.settings.get("dtype") or ""),
            max_seq_len=result.settings.get("max_seq_len"),
            batch_invariant=result.batch_invariant,
            environment=result.environment,
            absent_splits=tuple(result.data.get("absent_splits") or ()),
            told=told,
        )
        for name, metric in result.metrics.items()
    ]


def prompts_hash(rows: Iterable[Row]) -> str:
    """One hash over the prompts of all documents, whatever their order."""
    prompts = sorted(
        (str(r.get("task")), str(r.get("doc_id")), str(r["prompt_hash"])) for r in rows if "prompt_hash" in r
    )
    return hashlib.sha256(repr(prompts).encode()).hexdigest()[:_HASH_CHARACTERS] if prompts else ""


def score_charts(scores: Sequence[Score]) -> list[str]:
    """Every score of the newest step with its interval."""
    shares = [score for score in scores if score.is_share]
    if not shares:
        return []
    last = max(score.step for score in shares)
    bars = [
        charts.Bar(f"{score.task} {score.metric}", score.value, score.ci95, score.chance)
        for score in shares
        if score.step == last
    ]
    return [charts.score_chart(f"Scores at step {last:,}", bars)]


def subject_maps(evals: Sequence[StepEvals]) -> list[Subjects]:
    """A heat map of every group of tasks, over the steps that have it; groups of the newest step that has any."""
    found: list[Subjects] = []
    with_groups = [[result for result in step.results if result.subtasks and not result.is_judged] for step in evals]
    for result in next((groups for groups in reversed(with_groups) if groups), []):
        metric = next((name for row in result.subtasks.values() for name in row.get("metrics", {})), None)
        if metric is None:
            continue
        history = [(step.step, other) for step in evals for other in step.results if other.task == result.task]
        rows = [
            (name, int(row["n"]), tuple(_subtask_value(other, name, metric) for _, other in history))
            for name, row in result.subtasks.items()
        ]
        rows.sort(key=lambda row: -(row[2][-1] if row[2][-1] is not None else -math.inf))
        found.append(Subjects(result.task, metric, result.chance, tuple(step for step, _ in history), tuple(rows)))
    return found


def _subtask_value(result: TaskResult, name: str, metric: str) -> float | None:
    value = result.subtasks.get(name, {}).get("metrics", {}).get(metric, {})
    found = value.value if isinstance(value, Metric) else value.get("value")
    return None if found is None else float(found)


def _uncertainty(metric: Metric, n: int, by_document: DocumentScores | None) -> dict[str, Any]:
    """Interval, standard error, and how the interval was made."""
    clusters = None if by_document is None else by_document.clusters
    if by_document is not None and clusters is not None:
        return {"ci95": metric.ci95, "stderr": metric.stderr, "method": f"clustered by {len(set(clusters))} tasks"}
    return {"ci95": metric.ci95, "stderr": metric.stderr, "method": _method(metric, n)}


def _method(metric: Metric, n: int) -> str:
    """Which of the two intervals of results.make_metric it is."""
    if metric.ci95 is None:
        return ""
    made: list[tuple[str, tuple[float, float]]] = []
    if n and 0 <= metric.value <= 1:
        made.append(("Wilson", wilson_interval(metric.value * n, n)))
    if metric.stderr is not None:
        made.append(("normal", normal_interval(metric.value, metric.stderr)))
    for name, interval in made:
        if all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(interval, metric.ci95, strict=True)):
            return name
    return "the task's own"


def _origin(result: TaskResult) -> str:
    """Where the documents came from, short: a local folder by its last two names, as on the hub."""
    known = Path(str(result.data.get("path_or_id") or ""))
    return " ".join([str(result.data.get("origin") or ""), "/".join(known.parts[-2:])]).strip()
