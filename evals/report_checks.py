"""What scores are worth: without documents that stand in the training data, and beside the run's other checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.compare import Comparison, Side, compare_pairs
from evals.contamination_file import Contamination
from evals.report_inputs import StepEvals
from evals.results import Metric, TaskResult, make_metric
from evals.sample_files import DocumentScores, Row, document_scores
from evals.stats import bootstrap_interval, clustered_stderr, normal_interval
from megagpt.errors import EvalError

FEW = 30
"""Documents below which a part's score says little; the report says so."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a task's documents."""

    n: int
    score: Metric | None
    """None of no documents."""


@dataclass(frozen=True, slots=True)
class SplitScore:
    """One metric over all documents, those that do not stand in the training data, and those that do."""

    step: int
    task: str
    metric: str
    full: Part
    clean: Part
    dirty: Part
    n_not_matchable: int
    """Too short to be told; in `full` alone."""
    n_common: int
    """Of the dirty ones, those in more than ten training documents."""
    n_listed: int | None
    """That a data job's list names; None without a list."""


@dataclass(frozen=True, slots=True)
class NotSplit:
    """A task that cannot be split, and why."""

    step: int
    task: str
    reason: str


def split_scores(
    step: int, result: TaskResult, rows: Sequence[Row], contamination: Contamination
) -> list[SplitScore] | NotSplit:
    """Scores over all, clean and dirty documents; of each metric that is a mean over documents."""
    ours = str(result.data.get("sha256") or f"{result.data.get('origin')} {result.data.get('path_or_id')}")
    looked_for = contamination.data.get(result.task)
    if looked_for is None:
        return NotSplit(step, result.task, f"not looked for; `megagpt eval contamination --tasks {result.task}` does")
    if looked_for != ours:
        return NotSplit(step, result.task, f"other rows were looked for: data {looked_for}, scored on {ours}")
    by_document = document_scores(result, rows)
    if not by_document:
        return NotSplit(step, result.task, "no metric is a mean over single documents whose answers are kept")
    return [_split(step, result, scores, contamination) for scores in by_document.values()]


def tokens_scanned_and_seen(contamination: Contamination, own: Iterable[Path], seen: int | None) -> str:
    """That all tokens were looked at, and how many of them a run had seen; empty of a data job's list.

    Args:
        contamination: what was looked for and where.
        own: token files of the run.
        seen: tokens, repetitions counted, that the scored weights were trained on; None where not known.
    """
    if not contamination.scanned:
        return ""
    total = sum(contamination.scanned.values())
    whose = "the run's token files" if set(contamination.scanned) == set(map(str, own)) else "token files"
    start = f"All {total:,} tokens of {whose} were looked at"
    if whose == "token files":
        return f"{start}, which are not those of config.yaml; which of them the scored weights had seen is not known."
    if seen is None:
        return f"{start}; how many of them the scored weights had seen is not known."
    if seen < total:
        return (
            f"{start}, of which the scored weights had seen {seen:,} at most: a dirty document may stand in the part "
            "that they never saw."
        )
    return f"{start}; the scored weights had seen {seen:,}, repetitions counted."


def compare_checkpoints(evals: Sequence[StepEvals]) -> tuple[Comparison | None, str]:
    """The newest evaluated checkpoint against the one before it and the first, together; or why there is no test."""
    sides = [
        Side(f"step {step.step:,}", step.folder, {result.task: result for result in step.results})
        for step in evals
        if any(result.status == "ok" for result in step.results)
    ]
    if len(sides) < 2:
        return None, "A test needs two checkpoints with scores."
    earlier = {side.label: side for side in (sides[-2], sides[0])}
    try:
        return compare_pairs([(side, sides[-1]) for side in earlier.values()]), ""
    except EvalError as error:
        return None, str(error)


def _split(step: int, result: TaskResult, scores: DocumentScores, contamination: Contamination) -> SplitScore:
    tables = contamination.tasks
    kinds: dict[str, list[int]] = {"clean": [], "dirty": [], "not_matchable": []}
    for place, (leaf, document) in enumerate(scores.keys):
        table = tables.get(leaf)
        kind = "not_matchable"
        if table is not None and document in table.dirty:
            kind = "dirty"
        elif table is not None and document in table.clean:
            kind = "clean"
        kinds[kind].append(place)
    leaves = {leaf for leaf, _ in scores.keys if leaf in tables}
    better = result.metrics[scores.metric].higher_is_better
    listed = contamination.listed
    return SplitScore(
        step,
        result.task,
        scores.metric,
        full=_part(scores, range(len(scores.values)), higher_is_better=better),
        clean=_part(scores, kinds["clean"], higher_is_better=better),
        dirty=_part(scores, kinds["dirty"], higher_is_better=better),
        n_not_matchable=len(kinds["not_matchable"]),
        n_common=sum(tables[leaf].common for leaf in leaves),
        n_listed=None if listed is None else sum(listed.get(leaf, 0) for leaf in leaves),
    )


def _part(scores: DocumentScores, places: Iterable[int], *, higher_is_better: bool) -> Part:
    """The interval as the whole score has it.

    Wilson's of right or wrong, the bootstrap over documents of those with several answers each (as
    `humaneval.pass_metrics`), the normal one of other means; clustered where the whole score is.
    """
    chosen = list(places)
    if not chosen:
        return Part(0, None)
    values = [scores.values[place] for place in chosen]
    n, value = len(values), sum(values) / len(values)
    clusters = None if scores.clusters is None else [scores.clusters[place] for place in chosen]
    if clusters is not None and len(set(clusters)) > 1:
        stderr = clustered_stderr(values, clusters)
        low, high = normal_interval(value, stderr)
        return Part(n, Metric(value, stderr, (max(0.0, low), min(1.0, high)), higher_is_better))
    simple = math.sqrt(sum((x - value) ** 2 for x in values) / (n - 1) / n) if n > 1 else None
    is_repeated = scores.answers_each > 1
    if is_repeated and len(set(values)) > 1:
        return Part(n, Metric(value, simple, bootstrap_interval(np.array(values)), higher_is_better))
    is_proportion = scores.is_right_or_wrong or is_repeated  # all alike: no resample shows any doubt
    return Part(n, make_metric(value, simple, n, is_proportion=is_proportion, higher_is_better=higher_is_better))
