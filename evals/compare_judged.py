"""What one judge gave to two models' answers to the same questions, side by side: paired, by question.

Both turns of a question depend on each other and on the question, so questions are the units of interval and test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evals.mt_bench.items import MT_BENCH
from evals.results import TaskResult
from evals.sample_files import Row
from evals.stats import PairedDifference, clustered_stderr, paired_bootstrap
from megagpt.errors import EvalError

POINTS = {MT_BENCH: ("rating", "average")}
"""Task -> what a line of its samples calls the judge's points, and what the result calls their mean."""
ANSWERS = ("score", "score")
"""Of `megagpt eval answers`, whose tasks are named after files."""

_OF_ONE_MODEL = frozenset({"code", "sha256", "said"})
"""Of a judge's settings: its code, and the file that was read in its place, which holds one model's judgements."""


@dataclass(frozen=True, slots=True)
class JudgedDifference:
    """The mean of the points, B against A, over what has points on both sides."""

    metric: str
    mean_a: float
    mean_b: float
    found: PairedDifference
    stderr: float
    """Of the difference, with questions as units."""
    test: str
    """In words, with what is left out."""


def judges_differ(a: TaskResult, b: TaskResult) -> list[str]:
    """In what the two judges of one name are not the same."""
    one, other = (_settings_of(result) for result in (a, b))
    return [
        f"the judge's {name}: {one.get(name, 'not recorded')} and {other.get(name, 'not recorded')}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name) != other.get(name)
    ]


def judged_difference(
    results: tuple[TaskResult, TaskResult], rows: tuple[Sequence[Row], Sequence[Row]]
) -> JudgedDifference:
    """Compare what a judge gave.

    Args:
        results: of A and B, of one task, data and judge.
        rows: their samples.

    Raises:
        EvalError: the task compares two models already, or the two have points for fewer than two common questions.
    """
    task = results[0].task
    if task not in POINTS and not task.startswith("answers_"):
        raise EvalError("its points are those of one model against another already")
    points, metric = POINTS.get(task, ANSWERS)
    known_a, known_b = (_points_of(side, points) for side in rows)
    asked_a, asked_b = ({_place(row) for row in side} for side in rows)
    if asked_a != asked_b:
        raise EvalError(
            f"questions: {len(asked_a - asked_b)} are only in the one, {len(asked_b - asked_a)} only in the other"
        )
    common = [place for place in known_a if place in known_b]
    questions = [question for question, _ in common]
    if len(set(questions)) < 2:
        raise EvalError(f"only {len(set(questions))} questions have points on both sides; a test needs two")
    a, b = [known_a[place] for place in common], [known_b[place] for place in common]
    differences = [after - before for before, after in zip(a, b, strict=True)]
    lost = len(asked_a) - len(common)
    left_out = f"; {lost} of {len(asked_a)} judgements left out, without points on a side at least" if lost else ""
    return JudgedDifference(
        metric,
        sum(a) / len(a),
        sum(b) / len(b),
        paired_bootstrap(a, b, clusters=questions),
        clustered_stderr(differences, questions),
        f"paired z over questions{left_out}",
    )


def _settings_of(result: TaskResult) -> dict[str, Any]:
    settings = result.settings.get("judge_settings") or {}
    return {name: value for name, value in settings.items() if name not in _OF_ONE_MODEL}


def _points_of(rows: Sequence[Row], name: str) -> dict[tuple[str, str], float]:
    """(question, turn) -> points, where the judge gave some."""
    return {
        _place(row): float(row["metrics"][name])
        for row in rows
        if isinstance((row.get("metrics") or {}).get(name), int | float)
    }


def _place(row: Row) -> tuple[str, str]:
    return str(row.get("doc_id")), str(row.get("turn", 1))
