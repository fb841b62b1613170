"""HumanEval: functions that the model writes, run against hidden tests in the sandbox; pass@k.

Prompts, stop strings and lengths are those of lm-eval's definition, which is read and never imported: its module runs
code when it is loaded. What becomes of a completion is decided by `evals.sandbox` alone.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetsError
from lm_eval.api.instance import Instance

from evals.backend import MegaGPTLM
from evals.benchmarks import BENCHMARKS
from evals.data import data_hash, locate
from evals.data_checksum import checksum_of
from evals.results import Metric, make_metric
from evals.sample_files import PROMPT_END_CHARACTERS
from evals.sandbox.run import DEFAULT_LIMITS, Limits, Outcome, probe, run_tests
from evals.stats import bootstrap_interval, pass_at_k
from evals.task_loader import DataOrigin, TaskUnavailableError, hub_problem, task_definition
from megagpt.errors import EvalError

HUMANEVAL = "humaneval"
HUB_ID = "openai/openai_humaneval"
CONFIG, SPLIT = "openai_humaneval", "test"
TOP_P = 0.95
"""Of sampled completions. Source: Chen et al. 2021, "Evaluating large language models trained on code"."""
KS = (1, 10, 100)


@dataclass(frozen=True)
class Problem:
    """One row of the benchmark."""

    task_id: str
    prompt: str
    """Imports, signature and docstring; the completion goes on from here."""
    entry_point: str
    test: str
    """Defines `check(candidate)`."""
    canonical_solution: str = ""


@dataclass(frozen=True)
class CodeSettings:
    """How completions are drawn."""

    samples: int = 1
    """Completions a problem."""
    temperature: float = 0.0
    """0 is greedy."""

    def __post_init__(self) -> None:
        """Refuse what says nothing."""
        if self.samples > 1 and self.temperature == 0:
            raise EvalError(f"{self.samples} greedy completions of a problem are all the same; set --code-temperature")


@dataclass(frozen=True)
class Attempt:
    """One completion and what became of it."""

    problem: int
    """Number of the problem."""
    sample: int
    completion: str
    outcome: Outcome

    @property
    def passed(self) -> bool:
        """Whether every test held."""
        return self.outcome.status == "passed"


@dataclass(frozen=True)
class HumanEvalScores:
    """What a model scored."""

    metrics: dict[str, Metric]
    attempts: list[Attempt]
    outcomes: dict[str, int]
    """How often each status occurred."""

    def explain(self, arguments: Mapping[str, Any]) -> str:
        """Outcomes, and where `generation_arguments` had to deviate from the definition."""
        told = ", ".join(f"{n} {status}" for status, n in sorted(self.outcomes.items()))
        own = int(task_definition(HUMANEVAL)["generation_kwargs"]["max_gen_toks"])
        n = arguments["max_gen_toks"]
        return (
            told if n == own else f"{told}; completions have {n} tokens at most, as the context has no room for {own}"
        )


def check_allowed(*, allow_code: bool) -> None:
    """Refuse to run what the model wrote without the user's word, or without the sandbox.

    Raises:
        TaskUnavailableError: either is missing.
    """
    if not allow_code:
        raise TaskUnavailableError(
            "humaneval runs code that the model wrote; --allow-code lets it, in a sandbox (`megagpt eval doctor`)"
        )
    if not (found := probe()).ok:
        raise TaskUnavailableError(f"no sandbox for code that the model wrote: {found.reason}")


def load_problems(data_dir: Path | None, cache_dir: Path) -> tuple[list[Problem], DataOrigin]:
    """All 164 problems, from the user's data or the hub.

    Raises:
        TaskUnavailableError: they cannot be reached, or are only a part.
    """
    try:
        folder = None if data_dir is None else locate(HUB_ID, data_dir, cache_dir)
    except EvalError as error:
        raise TaskUnavailableError(str(error)) from None
    if folder is None and (reason := hub_problem()) is not None:
        raise TaskUnavailableError(
            f"{HUB_ID}: not in the local data, and the hub cannot be reached ({reason}); name a folder with --data"
        )
    try:
        rows = datasets.load_dataset(str(folder or HUB_ID), split=SPLIT, cache_dir=str(cache_dir / "arrow"))
        problems = [Problem(**{name: row[name] for name in Problem.__dataclass_fields__}) for row in rows]
    except (OSError, DatasetsError, ValueError, KeyError, ImportError) as error:
        raise TaskUnavailableError(f"{folder or HUB_ID}: {type(error).__name__}: {error}") from error
    expected = BENCHMARKS[HUMANEVAL].rows[SPLIT]
    if len(problems) != expected:
        raise TaskUnavailableError(
            f"{folder or HUB_ID}: {len(problems)} problems, the official number is {expected}: "
            "a part of a benchmark is not that benchmark"
        )
    if folder is None:
        return problems, DataOrigin("hub", HUB_ID, None)
    checksum = checksum_of(folder, HUB_ID, {CONFIG})
    return problems, DataOrigin("local", str(folder), data_hash(folder, {CONFIG}), checksum=checksum)


def item_rows(data_dir: Path | None, cache_dir: Path) -> tuple[list[dict[str, Any]], DataOrigin]:
    """All problems as `evals.items` writes documents: task, id, texts; errors as of `load_problems`."""
    problems, data = load_problems(data_dir, cache_dir)
    rows = [{"task": HUMANEVAL, "id": n, "texts": item_texts(problem)} for n, problem in enumerate(problems)]
    return rows, data


def item_texts(problem: Problem) -> list[str]:
    """What must not stand in training data (see `evals.items`): the problem with its solution, and by itself."""
    return [f"{problem.prompt}{problem.canonical_solution}".strip(), problem.prompt.strip()]


def run_and_count(
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    settings: CodeSettings,
    on_progress: Callable[[int, int], None],
    limits: Limits = DEFAULT_LIMITS,
) -> HumanEvalScores:
    """Run every completion, count what passed.

    Args:
        problems: what was to be solved.
        completions: of each problem, from `complete`.
        settings: how they were drawn.
        on_progress: told how many completions were run, and of how many.
        limits: of each completion's run.

    Raises:
        SandboxUnavailableError: the sandbox cannot be built.
    """
    attempts = run_attempts(problems, completions, on_progress, limits)
    passed = [0] * len(problems)
    for attempt in attempts:
        passed[attempt.problem] += attempt.passed
    return HumanEvalScores(
        metrics=pass_metrics(passed, settings.samples),
        attempts=attempts,
        outcomes=dict(Counter(attempt.outcome.status for attempt in attempts)),
    )


def generation_arguments(lm: MegaGPTLM, problems: Sequence[Problem], settings: CodeSettings) -> dict[str, Any]:
    """lm-eval's own arguments; fewer new tokens where the model's context has no room for all of them.

    The definition's 1,024 tokens leave no room for a prompt in a context of 1,024. Then a completion gets what the
    longest prompt leaves, and half of the context at least; prompts that do not fit lose their beginning and are
    counted.
    """
    own = task_definition(HUMANEVAL)["generation_kwargs"]
    longest = max((len(lm.tok_encode(problem.prompt)) for problem in problems), default=0)
    room = max(lm.max_length - longest, lm.max_length // 2)
    sampled = {"do_sample": True, "temperature": settings.temperature, "top_p": TOP_P}
    return {
        "until": own["until"],
        "max_gen_toks": min(int(own["max_gen_toks"]), room),
        **(sampled if settings.temperature else {"do_sample": False}),
    }


def complete(
    lm: MegaGPTLM, problems: Sequence[Problem], settings: CodeSettings, arguments: dict[str, Any]
) -> list[list[str]]:
    """`settings.samples` completions of each problem, each sample with a seed of its own.

    Args:
        lm: the model.
        problems: what to complete.
        settings: how often.
        arguments: from `generation_arguments`.
    """
    requests = [
        Instance(
            request_type="generate_until",
            doc={"task_id": problem.task_id},
            arguments=(problem.prompt, {**arguments, "seed": sample} if settings.temperature else arguments),
            idx=sample,
            metadata=(HUMANEVAL, number, settings.samples),
        )
        for number, problem in enumerate(problems)
        for sample in range(settings.samples)
    ]
    texts = lm.generate_until(requests)
    return [texts[start : start + settings.samples] for start in range(0, len(texts), settings.samples)]


def run_attempts(
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    on_progress: Callable[[int, int], None],
    limits: Limits = DEFAULT_LIMITS,
) -> list[Attempt]:
    """Run every completion in a sandbox of its own, as many at a time as there are CPU cores.

    Raises:
        SandboxUnavailableError: the sandbox cannot be built.
    """
    jobs = [(number, sample) for number, texts in enumerate(completions) for sample in range(len(texts))]

    def run(job: tuple[int, int]) -> Attempt:
        number, sample = job
        completion = completions[number][sample]
        return Attempt(number, sample, completion, run_completion(problems[number], completion, limits))

    attempts = []
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for attempt in pool.map(run, jobs):
            attempts.append(attempt)
            on_progress(len(attempts), len(jobs))
    return attempts


def run_completion(problem: Problem, completion: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Whether prompt and completion together pass the problem's tests."""
    return run_tests(
        problem.prompt + completion,
        setup=problem.prompt,  # some tests use what the prompt imports or defines
        tests=f"{problem.test}\ncheck({problem.entry_point})",
        entry_point=problem.entry_point,
        limits=limits,
    )


def pass_metrics(passed: Sequence[int], n: int) -> dict[str, Metric]:
    """pass@k with 95 % intervals: Wilson's for one completion a problem, else the bootstrap over problems.

    Where all problems have the same value, no resample shows any doubt; then it is Wilson's too, over problems.

    Args:
        passed: of each problem, how many of its n completions pass.
        n: completions a problem.
    """
    metrics = {}
    for k in (k for k in KS if k <= n):
        values = np.array([pass_at_k(n, count, k) for count in passed])
        stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        if n == 1 or len(set(values)) == 1:
            metrics[f"pass@{k}"] = make_metric(
                float(values.mean()), stderr, len(values), is_proportion=True, higher_is_better=True
            )
        else:
            metrics[f"pass@{k}"] = Metric(float(values.mean()), stderr, bootstrap_interval(values))
    return metrics


def sample_lines(problems: Sequence[Problem], attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """Lines of the samples file: completion, outcome, error."""
    return [
        {
            "task": HUMANEVAL,
            "doc_id": attempt.problem,
            "sample": attempt.sample,
            "doc_hash": _sha256(problem.task_id + problem.prompt + problem.test),
            "prompt_hash": _sha256(problem.prompt),
            "prompt_end": problem.prompt[-PROMPT_END_CHARACTERS:],
            "filter": "none",
            "target": problem.entry_point,
            "metrics": {"pass@1": float(attempt.passed)},
            "correct": attempt.passed,
            "response": attempt.completion,
            "outcome": attempt.outcome.status,
            "error": attempt.outcome.detail,
            "seconds": round(attempt.outcome.seconds, 3),
        }
        for attempt in attempts
        for problem in (problems[attempt.problem],)
    ]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
