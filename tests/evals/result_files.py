"""Results with answers, as `megagpt eval run` writes them, of made-up evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.results import Metric, TaskResult, make_metric

METRICS = ("acc", "acc_norm")


def sample(task: str, doc_id: int, right: dict[str, float], **values: Any) -> dict[str, Any]:
    """One line of a samples file, of a multiple choice task."""
    chosen = 1 if right.get("acc", 0) else 0
    return {
        "task": task,
        "doc_id": doc_id,
        "doc_hash": f"doc-{task}-{doc_id}",
        "prompt_hash": f"prompt-{task}-{doc_id}",
        "prompt_end": f"Question {doc_id} of {task}?\nAnswer:",
        "filter": "none",
        "target": 1,
        "metrics": right,
        "correct": bool(right.get("acc", 0)),
        "response": chosen,
        "choices": [" wrong", " right"],
        "logprobs": [-1.0 - doc_id / 100, -2.0] if chosen == 0 else [-3.0, -1.0 + doc_id / 1000],
        **values,
    }


def make_result(task: str, metrics: dict[str, Metric], *, step: int = 100, **values: Any) -> TaskResult:
    """The summary of one task."""
    return TaskResult(
        **{
            "task": task,
            "status": "ok",
            "reason": "",
            "checkpoint": {"run": "small", "step": step, "hash": f"c0ffee{step}"},
            "settings": {"n_shots": None, "limit": None, "batch_size": 16, "dtype": "fp32", "max_seq_len": 1024},
            "settings_hash": "0",
            "lm_eval_version": "0.4.13",
            "task_version": "1.0",
            "data": {"origin": "local", "path_or_id": f"eval_data/{task}", "sha256": f"sha-{task}"},
            "n_shots": 0,
            "metrics": metrics,
            **values,
        }
    )


def write_answers(
    folder: Path,
    task: str,
    right: Sequence[dict[str, float]],
    *,
    leaves: Sequence[str] | None = None,
    rows: Sequence[dict[str, Any]] | None = None,
    **values: Any,
) -> TaskResult:
    """A result and its samples: `right` is what each document scored in each metric."""
    folder.mkdir(parents=True, exist_ok=True)
    leaf = [task] * len(right) if leaves is None else list(leaves)
    lines = rows or [sample(name, i, scores) for i, (name, scores) in enumerate(zip(leaf, right, strict=True))]
    n = len(right)
    metrics = {}
    for name in right[0]:
        found = [scores[name] for scores in right]
        value = sum(found) / n
        is_share = set(found) <= {0.0, 1.0}
        stderr = (sum((x - value) ** 2 for x in found) / max(1, n - 1) / n) ** 0.5
        metrics[name] = make_metric(value, stderr, n, is_proportion=is_share, higher_is_better=True)
    subtasks = {}
    if leaves is not None:
        for name in dict.fromkeys(leaf):
            scores = [one["acc"] for one, other in zip(right, leaf, strict=True) if other == name]
            value = make_metric(sum(scores) / len(scores), None, len(scores), is_proportion=True, higher_is_better=True)
            subtasks[name] = {"n": len(scores), "metrics": {"acc": value}}
    result = make_result(task, metrics, **{"n": n, "n_total": n, "chance": 0.25, "subtasks": subtasks, **values})
    return result.write(folder, lines)
