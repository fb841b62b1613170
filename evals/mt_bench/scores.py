"""Ratings -> turn 1, turn 2, average, each category; intervals by resampling questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.judge.ask import FAILED, Judgement
from evals.mt_bench.data import WRONG_REFERENCES, Question
from evals.results import Metric

RESAMPLES = 10_000


@dataclass(frozen=True)
class MTBenchScores:
    """What `mt_bench.json` is made of."""

    metrics: dict[str, Metric]
    """average, turn_1, turn_2; and the average without the questions whose reference is known to be wrong."""
    categories: dict[str, dict[str, Any]]
    n_judged: int
    failures: int
    """Judgements without a rating; left out, as in FastChat."""


def score(
    questions: Sequence[Question], judgements: Sequence[Judgement], *, has_published_references: bool
) -> MTBenchScores:
    """Aggregate.

    Args:
        questions: all that were asked.
        judgements: one for each turn of each.
        has_published_references: whether the references are those of which some are known to be wrong.
    """
    ratings = np.full((len(questions), 2), np.nan)  # (Q, 2)
    place = {question.question_id: index for index, question in enumerate(questions)}
    for judgement in judgements:
        if judgement.score != FAILED:
            ratings[place[judgement.question_id], judgement.turn - 1] = judgement.score
    metrics = metrics_of(ratings)
    if has_published_references:
        right = np.array([question.question_id not in WRONG_REFERENCES for question in questions])
        metrics |= {"average_without_wrong_references": metrics_of(ratings[right])["average"]} if right.any() else {}
    categories: dict[str, dict[str, Any]] = {}
    for category in dict.fromkeys(question.category for question in questions):
        rows = ratings[[question.category == category for question in questions]]
        categories[category] = {"n": len(rows), "metrics": metrics_of(rows)}
    failures = sum(judgement.score == FAILED for judgement in judgements)
    return MTBenchScores(metrics, categories, len(judgements), failures)


def metrics_of(ratings: np.ndarray) -> dict[str, Metric]:
    """Means over all ratings that are there, with intervals over questions.

    Args:
        ratings: (Q, 2), NaN where there is none. As in FastChat the average is that of all ratings of both turns.
    """
    parts = {"average": ratings, "turn_1": ratings[:, :1], "turn_2": ratings[:, 1:]}
    return {name: metric for name, part in parts.items() if (metric := bootstrap_metric(part)) is not None}


def bootstrap_metric(ratings: np.ndarray, seed: int = 0) -> Metric | None:
    """Mean, its standard error and 95 % percentile interval, over resamples of the rows; None without any rating.

    Turns of one question stay together, since they depend on each other.

    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", section 13.3.
    """
    sums, counts = np.nansum(ratings, axis=1), np.isfinite(ratings).sum(axis=1)
    if not counts.any():
        return None
    random = np.random.default_rng(seed)
    chosen = random.integers(0, len(sums), (RESAMPLES, len(sums)))  # (R, Q)
    totals = counts[chosen].sum(axis=1)
    means = sums[chosen].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return Metric(float(sums.sum() / counts.sum()), float(means.std(ddof=1)), (float(low), float(high)))
