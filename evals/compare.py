"""`megagpt eval compare`: two or more evaluations of the same documents, side by side, with paired tests.

A difference counts as shown only where two things agree: the 95 % interval of the paired difference leaves out zero,
and the test's p-value, corrected for the number of tests made (Holm), is below 0.05. Everything else is "no difference
shown", however large it looks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.compare_judged import judged_difference, judges_differ
from evals.compare_settings import forbids, tells
from evals.results import TaskResult
from evals.sample_files import DocumentScores, document_scores, has_results, read_results, read_samples, step_folders
from evals.stats import (
    PairedDifference,
    holm,
    leaves_out_zero,
    mcnemar_exact,
    minimum_detectable_difference,
    paired_bootstrap,
    paired_stderr,
)
from megagpt.errors import EvalError

ALPHA = 0.05
NOT_SHOWN = "no difference shown"
MCNEMAR = "McNemar, exact"


@dataclass(frozen=True)
class Side:
    """One evaluation."""

    label: str
    folder: Path
    results: dict[str, TaskResult]


@dataclass(frozen=True, slots=True)
class Difference:
    """One metric of one task, B against A."""

    task: str
    metric: str
    a: str
    b: str
    n: int
    score_a: float
    score_b: float
    difference: float
    """score_b - score_a."""
    ci95: tuple[float, float]
    n_clusters: int | None
    """Groups of documents that the interval takes as units; None for single documents."""
    only_a: int | None
    """Documents that only A has right; None where documents are not just right or wrong."""
    only_b: int | None
    test: str
    """`McNemar, exact`, `paired z`, or `paired z, over groups`: the units are those of the interval."""
    p: float
    p_holm: float
    """Corrected for all tests of this comparison."""
    detectable: float | None
    """The true difference that 4 of 5 such evaluations would show; None where all differences are the same."""
    higher_is_better: bool
    notes: tuple[str, ...] = ()
    """What was not the same on both sides, and does not forbid the comparison."""

    @property
    def is_shown(self) -> bool:
        """Whether interval and corrected test agree that there is a difference."""
        return leaves_out_zero(self.ci95) and self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.is_shown:
            return NOT_SHOWN
        return f"{self.b if self.is_b_better else self.a} is better"

    @property
    def is_b_better(self) -> bool:
        """Whether B's score is the better one, by however little."""
        return (self.difference > 0) == self.higher_is_better


@dataclass(frozen=True, slots=True)
class Refusal:
    """A task that two evaluations do not have in common, or not in the same form."""

    task: str
    a: str
    b: str
    reasons: tuple[str, ...]
    differs: bool = False
    """Both have it, but not of the same documents, shots, prompts or data."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that can be said about the evaluations."""

    labels: tuple[str, ...]
    """The first is what the others are compared with."""
    differences: tuple[Difference, ...]
    refusals: tuple[Refusal, ...]

    def by_pair(self) -> list[tuple[tuple[str, str], list[Difference]]]:
        """The differences of each two evaluations."""
        found: dict[tuple[str, str], list[Difference]] = {}
        for row in self.differences:
            found.setdefault((row.a, row.b), []).append(row)
        return list(found.items())

    def notes(self) -> list[tuple[str, str, str, str]]:
        """Task, A, B, and what was not the same on both sides."""
        found = {(row.task, row.a, row.b): "; ".join(row.notes) for row in self.differences if row.notes}
        return [(*key, told) for key, told in found.items()]

    def to_json(self) -> str:
        """Everything, as plain values."""
        rows = [{**asdict(row), "shown": row.is_shown, "verdict": row.verdict} for row in self.differences]
        content: dict[str, Any] = {
            "format": 1,
            "evaluations": list(self.labels),
            "tests": len(rows),
            "alpha": ALPHA,
            "differences": rows,
            "refused": [asdict(refusal) for refusal in self.refusals],
        }
        return json.dumps(content, indent=1, ensure_ascii=False)


def open_side(path: Path) -> Side:
    """The newest results of a run, those of one of its checkpoints, or a folder of results.

    Raises:
        EvalError: there are none, or one is damaged.
    """
    folder = path
    if path.parent.name == "checkpoints":
        folder = path.parent.parent / "evals" / path.name
    elif (path / "config.yaml").is_file() or (path / "evals").is_dir():
        evaluated = [found for _, found in step_folders(path / "evals") if has_results(found)]
        folder = evaluated[-1] if evaluated else path / "evals"
    results = {result.task: result for result in read_results(folder)} if folder.is_dir() else {}
    if not results:
        raise EvalError(f"{folder}: no results there; `megagpt eval run --checkpoint {path}` makes them")
    step = next(iter(results.values())).checkpoint.get("step")
    parts = folder.resolve().parts
    name = parts[-3] if len(parts) >= 3 and parts[-2] == "evals" else parts[-1]
    return Side(name if step is None else f"{name} at step {step:,}", folder, results)


def compare(paths: Sequence[Path]) -> Comparison:
    """Compare every evaluation with the first.

    Args:
        paths: of two evaluations or more, see `open_side`.

    Raises:
        EvalError: fewer than two, or one without results, or nothing of them can be compared: says why.
    """
    if len(paths) < 2:
        raise EvalError(f"{len(paths)} evaluations; name two or more to compare")
    first, *others = _with_different_labels([open_side(path) for path in paths])
    return compare_pairs([(first, other) for other in others])


def compare_pairs(pairs: Sequence[tuple[Side, Side]]) -> Comparison:
    """Compare the second of each pair with the first; all tests are corrected together.

    Raises:
        EvalError: nothing can be compared.
    """
    measured: list[Difference] = []
    refused: list[Refusal] = []
    for first, second in pairs:
        for task in dict.fromkeys([*first.results, *second.results]):
            found = _compare_task(task, first, second)
            if isinstance(found, Refusal):
                refused.append(found)
            else:
                measured += found
    if not measured:
        reasons = "\n".join(f"{r.task} ({r.a} and {r.b}): {'; '.join(r.reasons)}" for r in refused)
        raise EvalError(f"nothing of these evaluations can be compared:\n{reasons}")
    corrected = holm([row.p for row in measured])
    rows = [Difference(**{**asdict(row), "p_holm": p}) for row, p in zip(measured, corrected, strict=True)]
    labels = dict.fromkeys(side.label for pair in pairs for side in pair)
    return Comparison(tuple(labels), tuple(rows), tuple(refused))


def _with_different_labels(sides: list[Side]) -> list[Side]:
    """Two evaluations of one name are told apart by their folders."""
    labels = [side.label for side in sides]
    return [
        side if labels.count(side.label) == 1 else Side(f"{side.label} ({side.folder})", side.folder, side.results)
        for side in sides
    ]


def _compare_task(task: str, a: Side, b: Side) -> list[Difference] | Refusal:
    """Every metric that both have for the same documents, or why there is none."""
    lacking = [side.label for side in (a, b) if task not in side.results]
    if lacking:
        return Refusal(task, a.label, b.label, tuple(f"{label} has no result of it" for label in lacking))
    results = (a.results[task], b.results[task])
    gone = [
        f"{side.label}: {result.reason}" for side, result in zip((a, b), results, strict=True) if result.status != "ok"
    ]
    if gone:
        return Refusal(task, a.label, b.label, tuple(gone))
    reasons = forbids(*results)
    if reasons:
        return Refusal(task, a.label, b.label, tuple(reasons), differs=True)
    if results[0].is_judged and results[1].is_judged:
        return _compare_judged(results, a, b)
    scores_a, scores_b = (
        document_scores(side.results[task], read_samples(side.folder, side.results[task])) for side in (a, b)
    )
    metrics = [metric for metric in results[0].metrics if metric in scores_a and metric in scores_b]
    if not metrics:
        return Refusal(task, a.label, b.label, ("no metric is a mean over single documents whose answers are kept",))
    reasons = _documents_differ(scores_a[metrics[0]], scores_b[metrics[0]])
    if reasons:
        return Refusal(task, a.label, b.label, tuple(reasons), differs=True)
    return [
        _difference(results, scores_a[metric], _in_order_of(scores_a[metric], scores_b[metric]), (a.label, b.label))
        for metric in metrics
    ]


def _documents_differ(a: DocumentScores, b: DocumentScores) -> list[str]:
    keys_a, keys_b = set(a.keys), set(b.keys)
    twice = [len(scores.keys) - len(set(scores.keys)) for scores in (a, b)]
    if any(twice):
        return [f"documents: {twice[0]} answers of the one and {twice[1]} of the other are not a document's first"]
    if keys_a != keys_b:
        return [f"documents: {len(keys_a - keys_b)} are only in the one, {len(keys_b - keys_a)} only in the other"]
    reasons = []
    for name, hashes_a, hashes_b in (("contents", a.documents, b.documents), ("prompts", a.prompts, b.prompts)):
        by_key = dict(zip(b.keys, hashes_b, strict=True))
        other = [key for key, value in zip(a.keys, hashes_a, strict=True) if by_key[key] != value]
        if other:
            example = " ".join(other[0])
            reasons.append(f"{name} of {len(other)} of {len(a.keys)} documents differ (first: {example})")
    return reasons


def _in_order_of(a: DocumentScores, b: DocumentScores) -> tuple[float, ...]:
    by_key = dict(zip(b.keys, b.values, strict=True))
    return tuple(by_key[key] for key in a.keys)


def _difference(
    results: tuple[TaskResult, TaskResult], a: DocumentScores, b: tuple[float, ...], labels: tuple[str, str]
) -> Difference:
    """The difference before the correction for several tests. Interval and test have the same units."""
    clusters = a.clusters
    found: PairedDifference = paired_bootstrap(a.values, b, clusters=clusters)
    stderr = paired_stderr(a.values, b, clusters=clusters)
    only_a: int | None = None
    only_b: int | None = None
    test = "paired z" if clusters is None else "paired z, over groups"
    p = _z_test(found.value, stderr)
    if a.is_right_or_wrong and all(value in (0.0, 1.0) for value in b):
        pairs = list(zip(a.values, b, strict=True))
        only_a, only_b = sum(x > y for x, y in pairs), sum(y > x for x, y in pairs)
        if clusters is None:
            test, p = MCNEMAR, mcnemar_exact(only_a, only_b)
    return Difference(
        results[0].task,
        a.metric,
        *labels,
        n=found.n,
        score_a=results[0].metrics[a.metric].value,
        score_b=results[1].metrics[a.metric].value,
        difference=found.value,
        ci95=found.ci95,
        n_clusters=found.n_clusters,
        only_a=only_a,
        only_b=only_b,
        test=test,
        p=p,
        p_holm=p,
        detectable=minimum_detectable_difference(stderr) if stderr > 0 else None,
        higher_is_better=results[0].metrics[a.metric].higher_is_better,
        notes=tuple(tells(*results)),
    )


def _z_test(difference: float, stderr: float) -> float:
    """Two-sided p-value of a mean difference. Source: Miller 2024, "Adding Error Bars to Evals", section 4."""
    if math.isnan(stderr):
        return 1.0
    if stderr == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / stderr / math.sqrt(2))


def _compare_judged(results: tuple[TaskResult, TaskResult], a: Side, b: Side) -> list[Difference] | Refusal:
    """Points of the same judge, by question."""
    task = results[0].task
    if reasons := judges_differ(*results):
        return Refusal(task, a.label, b.label, tuple(reasons), differs=True)
    rows_a, rows_b = (read_samples(side.folder, result) for side, result in zip((a, b), results, strict=True))
    try:
        judged = judged_difference(results, (rows_a, rows_b))
    except EvalError as error:
        return Refusal(task, a.label, b.label, (str(error),))
    found, p = judged.found, _z_test(judged.found.value, judged.stderr)
    return [
        Difference(
            task,
            judged.metric,
            a.label,
            b.label,
            n=found.n,
            score_a=judged.mean_a,
            score_b=judged.mean_b,
            difference=found.value,
            ci95=found.ci95,
            n_clusters=found.n_clusters,
            only_a=None,
            only_b=None,
            test=judged.test,
            p=p,
            p_holm=p,
            detectable=minimum_detectable_difference(judged.stderr) if judged.stderr > 0 else None,
            higher_is_better=True,
            notes=tuple(tells(*results)),
        )
    ]
