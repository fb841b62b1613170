"""What a model answered to single documents: the samples files beside the results, and each metric by document."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.lines import read_whole_file
from evals.results import Metric, TaskResult
from evals.stats import clustered_stderr, normal_interval, pass_at_k
from megagpt.errors import EvalError

GENERATIONS_FILE = "generations.json"
"""Beside the results of a step; the one JSON file there that is none."""

PROMPT_END_CHARACTERS = 300
"""Of a prompt, that a samples file keeps."""

LEAST_CLUSTERS = 20
"""Groups of documents (MMLU's subjects) below which a group is no unit: an error estimated from few is itself
unreliable. Source: Cameron and Miller 2015, "A Practitioner's Guide to Cluster-Robust Inference", section VI."""

_PASS_AT = re.compile(r"pass@(\d+)")
_STEP_FOLDER = re.compile(r"step_(\d+)")

Row = dict[str, Any]
Key = tuple[str, str]
"""Leaf task and document, as the samples files have them."""


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """One metric's value for every document of a result."""

    metric: str
    keys: tuple[Key, ...]
    """In the order of the samples file."""
    documents: tuple[str, ...]
    """Hash of each document."""
    prompts: tuple[str, ...]
    """Hash of each prompt."""
    values: tuple[float, ...]
    answers_each: int = 1
    """Answers of a document, at most; of several, a value is their mean, or the chance that one of k passes."""

    @property
    def is_right_or_wrong(self) -> bool:
        """Whether every value is 0 or 1."""
        return all(value in (0.0, 1.0) for value in self.values)

    @property
    def clusters(self) -> tuple[str, ...] | None:
        """The leaf task of each document, where there are enough of them to be units; else None."""
        leaves = tuple(leaf for leaf, _ in self.keys)
        return leaves if len(set(leaves)) >= LEAST_CLUSTERS else None


def step_folders(evals_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every evaluated checkpoint of a run, oldest first."""
    found = [
        (int(match[1]), path)
        for path in (evals_dir.glob("step_*") if evals_dir.is_dir() else ())
        if (match := _STEP_FOLDER.fullmatch(path.name)) is not None
    ]
    return sorted(found)


def has_results(folder: Path) -> bool:
    """Whether a step's folder holds the result of any task."""
    return any(path.name != GENERATIONS_FILE for path in folder.glob("*.json"))


def read_results(folder: Path) -> tuple[TaskResult, ...]:
    """The results of one checkpoint, by task.

    Raises:
        EvalError: one of them is damaged.
    """
    return tuple(TaskResult.read(path) for path in sorted(folder.glob("*.json")) if path.name != GENERATIONS_FILE)


def read_samples(folder: Path, result: TaskResult) -> list[Row]:
    """The answers that a result was made from; none where the result names no file.

    Raises:
        EvalError: the file is missing or damaged.
    """
    if result.samples is None:
        return []
    path = folder / result.samples
    if Path(result.samples).name != result.samples:
        raise EvalError(f"{folder / result.task}.json: names {result.samples!r}; samples lie beside the result")
    return read_whole_file(path, f"delete {result.task}.json to evaluate again")


def document_scores(result: TaskResult, rows: Sequence[Row]) -> dict[str, DocumentScores]:
    """Metric of the result -> its value by document, for every metric that is a mean over documents.

    Perplexity, for instance, is none: the exponential of a mean has no value for a single document that adds up.
    A document that was answered several times (HumanEval's samples) is one document: its value is the mean over its
    answers, and of pass@k the unbiased estimate from them. A document that stands twice otherwise stands twice here.
    """
    return _document_scores(result.task, result.metrics, rows)


def _document_scores(task: str, metrics: Mapping[str, Metric], rows: Sequence[Row]) -> dict[str, DocumentScores]:
    found: dict[str, dict[tuple[Key, int], list[tuple[Row, float]]]] = {}
    for number, row in enumerate(rows):
        document = (str(row.get("task", task)), str(row.get("doc_id")))
        key = (document, 0 if "sample" in row else number)
        for name, value in (row.get("metrics") or {}).items():
            if isinstance(value, bool | int | float):
                filter_name = row.get("filter", "none")
                metric = name if filter_name in ("none", None) else f"{name},{filter_name}"
                found.setdefault(metric, {}).setdefault(key, []).append((row, float(value)))
    scores = {}
    for metric in metrics:
        k = int(match[1]) if (match := _PASS_AT.fullmatch(metric)) else None
        answers = found.get(metric if k is None else "pass@1", {})
        values = [_of_document([value for _, value in each], k) for each in answers.values()]
        known = metrics[metric].value
        if not values or not math.isclose(sum(values) / len(values), known, rel_tol=1e-6, abs_tol=1e-9):
            continue
        firsts = [each[0][0] for each in answers.values()]
        scores[metric] = DocumentScores(
            metric,
            tuple(document for document, _ in answers),
            tuple(str(row.get("doc_hash")) for row in firsts),
            tuple(str(row.get("prompt_hash")) for row in firsts),
            tuple(values),
            max(map(len, answers.values())),
        )
    return scores


def _of_document(values: Sequence[float], k: int | None) -> float:
    """Of all answers to one document."""
    if k is None or k == 1:
        return sum(values) / len(values)
    return pass_at_k(len(values), round(sum(values)), k) if k <= len(values) else math.nan


def with_clustered_intervals(result: TaskResult, rows: Sequence[Row]) -> TaskResult:
    """The result with clustered standard errors and intervals where its documents come in groups, such as MMLU's."""
    return replace(result, metrics=clustered_metrics(result.task, result.metrics, rows))


def clustered_metrics(task: str, metrics: Mapping[str, Metric], rows: Sequence[Row]) -> dict[str, Metric]:
    """`with_clustered_intervals` of metrics alone.

    Args:
        task: of which `rows` are answers.
        metrics: of the task or group.
        rows: lines of its samples file.
    """
    found = dict(metrics)
    for name, scores in _document_scores(task, metrics, rows).items():
        clusters = scores.clusters
        if clusters is not None:
            stderr = clustered_stderr(scores.values, clusters)
            low, high = normal_interval(metrics[name].value, stderr)
            within = (max(0.0, low), min(1.0, high)) if scores.is_right_or_wrong else (low, high)
            found[name] = replace(metrics[name], stderr=stderr, ci95=within)
    return found
