"""Loaded tasks and a model -> scores, through lm-eval's own evaluation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import lm_eval.api.task
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

from evals.backend import MegaGPTLM
from evals.prompts import kept_templates
from evals.results import Metric, make_metric
from evals.sample_files import PROMPT_END_CHARACTERS
from evals.task_loader import LoadedTask

BOOTSTRAP_ITERATIONS = 1000
"""Only for metrics whose standard error has no closed form (perplexity, F1 ...)."""


@dataclass(frozen=True)
class Scores:
    """What a task or group scored."""

    metrics: dict[str, Metric]
    subtasks: dict[str, dict[str, Any]]
    n: int
    n_total: int
    n_shots: int | None
    """None where the tasks of a group differ."""
    chance: float | None
    truncated: int
    version: str
    samples: list[dict[str, Any]]
    splits: dict[str, list[str]]
    """`scored`, and of prompts with worked examples `examples`: the splits that each were taken from."""


def score_task(
    lm: MegaGPTLM, loaded: LoadedTask, limit: int | None, *, bootstrap: int = BOOTSTRAP_ITERATIONS
) -> Scores:
    """Evaluate one task or group.

    Args:
        lm: a fresh backend: its truncation counts become this task's.
        loaded: the tasks.
        limit: score only the first documents of each task; None for all.
        bootstrap: iterations, for metrics that need it; 0 leaves their standard error out.
    """
    with quiet_bars(), kept_templates():
        found = evaluate(
            lm,
            {"tasks": loaded.tasks, "groups": loaded.groups},
            limit=limit,
            bootstrap_iters=bootstrap,
            log_samples=True,
        )
    samples: dict[str, list[dict[str, Any]]] = found["samples"]
    counts = {name: found["n-samples"][name] for name in loaded.tasks}
    leaves = {
        name: _metrics(found, name, counts[name]["effective"], _proportions({name: samples[name]}))
        for name in loaded.tasks
    }
    n = sum(count["effective"] for count in counts.values())
    is_single = list(loaded.tasks) == [loaded.name]
    shots = {int(task.get_config("num_fewshot")) for task in loaded.tasks.values()}
    return Scores(
        metrics=leaves[loaded.name] if is_single else _metrics(found, loaded.name, n, _proportions(samples)),
        subtasks={}
        if is_single
        else {name: {"n": counts[name]["effective"], "metrics": metrics} for name, metrics in leaves.items()},
        n=n,
        n_total=sum(count["original"] for count in counts.values()),
        n_shots=shots.pop() if len(shots) == 1 else None,
        chance=_chance(loaded, samples),
        truncated=sum(len(documents) for documents in lm.truncated.values()),
        version=str(found["versions"].get(loaded.name)),
        samples=[line for name, task in loaded.tasks.items() for line in _sample_lines(name, task, samples[name])],
        splits=_splits(loaded),
    )


@contextmanager
def quiet_bars() -> Iterator[None]:
    """One progress bar is ours; lm-eval shows one a task while it builds prompts and has no switch for it."""
    original = lm_eval.api.task.tqdm
    was_enabled = not datasets.are_progress_bars_disabled()
    lm_eval.api.task.tqdm = functools.partial(original, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = original
        if was_enabled:
            datasets.enable_progress_bars()


def _metrics(found: Mapping[str, Any], name: str, n: int, proportions: set[str]) -> dict[str, Metric]:
    """lm-eval's `metric,filter` keys -> ours: the filter is named only where there is one."""
    directions = found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in found["results"].get(name, {}).items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = found["results"][name].get(f"{metric}_stderr,{filter_name}")
        metrics[metric if filter_name == "none" else key] = make_metric(
            float(value),
            None if stderr is None or isinstance(stderr, str) else float(stderr),  # "N/A"
            n,
            is_proportion=metric in proportions,
            higher_is_better=directions.get(metric) is not False,
        )
    return metrics


def _proportions(samples: Mapping[str, list[dict[str, Any]]]) -> set[str]:
    """Metrics that are 0 or 1 for every document of every task."""
    rows = [sample for found in samples.values() for sample in found]
    names = {name for row in rows for name in row["metrics"]}
    return {name for name in names if all(row.get(name, 0) in (0, 1) for row in rows)}


def _chance(loaded: LoadedTask, samples: Mapping[str, list[dict[str, Any]]]) -> float | None:
    """Mean of 1 / choices, where every task is multiple choice with one right answer."""
    if any(task.OUTPUT_TYPE != "multiple_choice" for task in loaded.tasks.values()):
        return None
    if "acc" not in _proportions(samples) or any(isinstance(s["target"], list) for f in samples.values() for s in f):
        return None
    guesses = [1 / len(sample["resps"]) for found in samples.values() for sample in found]
    return sum(guesses) / len(guesses)


def _splits(loaded: LoadedTask) -> dict[str, list[str]]:
    """Where lm-eval takes documents and worked examples from. Source: lm-eval 0.4.13, api/task.py, `fewshot_docs`."""
    scored, examples = set(), set()
    for task in loaded.tasks.values():
        config, own = task.config, task.fewshot_cfg
        scored.add(str(config.test_split if task.has_test_docs() else config.validation_split))
        if not task.get_config("num_fewshot"):
            continue
        if own.split is not None:
            examples.add(str(own.split))
        elif own.samples is not None:
            examples.add("the task's own")
        else:
            examples.add(str(config.training_split or config.validation_split or config.test_split))
    return {"scored": sorted(scored), **({"examples": sorted(examples)} if examples else {})}


def _sample_lines(name: str, task: Task, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the samples file, of all documents of a task: whether a metric is 0 or 1 is seen on all of them."""
    is_share = _is_scored_by_share(task)
    right_or_wrong = set() if is_share else _proportions({name: samples})
    return [_sample(name, sample, right_or_wrong, is_share=is_share) for sample in samples]


def _sample(task: str, sample: Mapping[str, Any], right_or_wrong: set[str], *, is_share: bool) -> dict[str, Any]:
    """One line; `logprobs` are sums over the choice's tokens, in nats.

    `correct` is null where the metric is not 0 or 1. `right` has the numbers of the right choices where the score is
    their share of the probability: of truthfulqa_mc2, whose `target` is 0 for every document and says nothing.
    """
    values = {name: sample[name] for name in sample["metrics"]}
    decides = next((name for name in ("acc", "exact_match") if name in values), None)
    line = {
        "task": task,
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        "prompt_end": str(sample["arguments"][0][0])[-PROMPT_END_CHARACTERS:],
        "filter": sample["filter"],
        "target": sample["target"],
        "metrics": values,
        "correct": bool(values[decides]) if decides in right_or_wrong else None,
    }
    if is_share:
        line["right"] = [i for i, label in enumerate(sample["doc"]["mc2_targets"]["labels"]) if int(label) == 1]
    answers = sample["filtered_resps"]
    if answers and isinstance(answers[0], tuple | list) and len(answers[0]) == 2:
        logprobs = [float(answer[0]) for answer in answers]
        chosen = max(range(len(logprobs)), key=logprobs.__getitem__)
        return {**line, "response": chosen, "choices": [str(a[1]) for a in sample["arguments"]], "logprobs": logprobs}
    return {**line, "response": answers[0] if answers else None, "raw_response": sample["resps"][0][0]}


def _is_scored_by_share(task: Task) -> bool:
    """Whether a document's score is the share of probability that its right choices have together (truthfulqa_mc2).

    Source: lm-eval 0.4.13, tasks/truthfulqa/utils.py, `process_results_mc2`.
    """
    return getattr(task.config.process_results, "__name__", "") == "process_results_mc2"
