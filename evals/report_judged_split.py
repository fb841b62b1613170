"""Ratings of a judge over all questions, those that stand in the training data, and those that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evals.contamination_file import Contamination
from evals.mt_bench.items import MT_BENCH
from evals.mt_bench.scores import bootstrap_metric
from evals.report_checks import NotSplit, Part, SplitScore
from evals.results import TaskResult
from evals.sample_files import Row

RATED = {MT_BENCH: ("rating", "average"), f"{MT_BENCH}_against": ("points", "points")}
"""Task -> what a line of its samples calls the judge's points, and what the result calls their mean."""


def split_judged(
    step: int, result: TaskResult, rows: Sequence[Row], contamination: Contamination
) -> SplitScore | NotSplit:
    """The mean over both turns of all, clean and dirty questions, with intervals from resampling questions."""
    if result.task not in RATED:
        reason = "its questions are a file of the user's own, which `megagpt eval contamination` does not look for"
        return NotSplit(step, result.task, reason)
    looked_for = contamination.data.get(MT_BENCH)
    ours = str(result.data.get("sha256"))
    if looked_for is None:
        reason = f"not looked for; `megagpt eval contamination --tasks {MT_BENCH}` does"
    elif looked_for != ours:
        reason = f"other files were looked for: data {looked_for}, judged on {ours}"
    elif result.metrics.get(RATED[result.task][1]) is None:
        reason = "no judgement has points"
    elif not rows:
        reason = "the single judgements were not kept"
    else:
        return _split(step, result, rows, contamination)
    return NotSplit(step, result.task, reason)


def _split(step: int, result: TaskResult, rows: Sequence[Row], contamination: Contamination) -> SplitScore:
    points, mean = RATED[result.task]
    questions = list(dict.fromkeys(str(row.get("doc_id")) for row in rows))
    ratings = np.full((len(questions), 2), np.nan)  # (Q, 2)
    for row in rows:
        value = (row.get("metrics") or {}).get(points)
        if value is not None:
            ratings[questions.index(str(row.get("doc_id"))), int(row["turn"]) - 1] = float(value)
    table, listed = contamination.tasks[MT_BENCH], contamination.listed
    clean, dirty = (np.array([question in kind for question in questions]) for kind in (table.clean, table.dirty))
    return SplitScore(
        step,
        result.task,
        mean,
        full=_part(ratings),
        clean=_part(ratings[clean]),
        dirty=_part(ratings[dirty]),
        n_not_matchable=int((~(clean | dirty)).sum()),
        n_common=table.common,
        n_listed=None if listed is None else listed.get(MT_BENCH, 0),
    )


def _part(ratings: np.ndarray) -> Part:
    """Of one question no interval is known: every resample is that question."""
    metric = bootstrap_metric(ratings) if len(ratings) else None
    if metric is not None and len(ratings) == 1:
        metric = replace(metric, stderr=None, ci95=None)
    return Part(len(ratings), metric)
