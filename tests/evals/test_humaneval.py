"""HumanEval: the estimator, the runner on problems written here, and the real ones where they are."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from evals.data import write_dataset
from evals.humaneval import (
    CONFIG,
    HUB_ID,
    CodeSettings,
    Problem,
    bootstrap_interval,
    complete,
    generation_arguments,
    load_problems,
    pass_at_k,
    pass_metrics,
    run_and_count,
    run_attempts,
    sample_lines,
)
from evals.items import write_items
from evals.results import wilson_interval
from evals.run import EvalRequest, run_evals
from evals.sandbox.run import run_program
from evals.task_loader import TaskUnavailableError
from megagpt.errors import EvalError
from tests.evals.conftest import CONTEXT, SHARED, save_run
from tests.evals.sandbox_host import needs_namespaces

REAL = SHARED / "humaneval" / "HumanEval.jsonl.gz"
SUITES = Path(__file__).resolve().parents[2] / "configs" / "evals"

with_shared = pytest.mark.skipif(not REAL.is_file(), reason=f"{REAL} is not here")

DOUBLE = Problem(
    "ours/0",
    'from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    """Twice each number."""\n',
    "double",
    "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n",
    "    return [2 * x for x in xs]\n",
)
NEAREST = Problem(
    "ours/1",
    'import math\n\n\ndef area(r):\n    return math.pi * r * r\n\n\ndef radius(a):\n    """Of a circle\'s area."""\n',
    "radius",
    "def check(candidate):\n    for a in (1.0, 2.5):\n        assert math.isclose(area(candidate(a)), a)\n",
    "    return math.sqrt(a / math.pi)\n",
)


def count(n: int, passed: int, k: int) -> float:
    """The share of all choices of k that hold a passing one."""
    choices = list(itertools.combinations([True] * passed + [False] * (n - passed), k))
    return sum(any(choice) for choice in choices) / len(choices)


@pytest.mark.parametrize(
    ("n", "passed", "k"), [(n, c, k) for n in (1, 3, 6) for c in range(n + 1) for k in (1, 2, n) if k <= n]
)
def test_pass_at_k_is_the_share_of_all_choices(n: int, passed: int, k: int) -> None:
    assert pass_at_k(n, passed, k) == pytest.approx(count(n, passed, k))


def test_intervals_are_wilsons_for_one_completion_and_bootstrapped_for_more() -> None:
    one = pass_metrics([1, 0, 0, 0], 1)
    assert list(one) == ["pass@1"]
    assert one["pass@1"].value == 0.25
    assert one["pass@1"].ci95 == wilson_interval(1, 4)
    many = pass_metrics([0, 3, 10, 20] * 25, 20)
    assert list(many) == ["pass@1", "pass@10"]
    low, high = many["pass@1"].ci95
    mean, spread = many["pass@1"].value, 1.96 * many["pass@1"].stderr
    assert mean == pytest.approx(33 / 80)
    assert (low, high) == pytest.approx((mean - spread, mean + spread), abs=0.01)


def test_no_interval_is_empty_where_nothing_passes() -> None:
    assert pass_metrics([0] * 40, 20)["pass@10"].ci95 == wilson_interval(0, 40)
    assert pass_metrics([20] * 40, 20)["pass@10"].ci95 == wilson_interval(40, 40)


def test_the_bootstrap_is_the_same_each_time() -> None:
    import numpy as np

    values = np.array([0.0, 1.0, 1.0, 0.5])
    assert bootstrap_interval(values) == bootstrap_interval(values)


@needs_namespaces
def test_completions_are_told_as_what_they_are() -> None:
    texts = [
        [
            DOUBLE.canonical_solution,
            "    return xs\n",
            "    return undefined\n",
            "    while True: pass\n",
            "    exit(0)\n",
        ],
        [NEAREST.canonical_solution, "    return a ** .5\n", "    return\n)", "", "    import os; os._exit(0)\n"],
    ]
    from evals.sandbox.run import Limits

    told = []
    attempts = run_attempts([DOUBLE, NEAREST], texts, lambda *at: told.append(at), Limits(cpu_seconds=1))
    found = [[a.outcome.status for a in attempts if a.problem == number] for number in (0, 1)]
    assert found == [
        ["passed", "failed", "failed", "timed_out", "failed"],
        ["passed", "failed", "failed", "failed", "ended"],
    ]
    assert attempts[2].outcome.detail == "NameError: name 'undefined' is not defined"
    assert told == [(n, 10) for n in range(1, 11)]
    line = sample_lines([DOUBLE, NEAREST], attempts)[1]
    assert (line["correct"], line["response"], line["outcome"]) == (False, "    return xs\n", "failed")
    assert line["error"] == "AssertionError"


def test_stop_strings_and_lengths_are_those_of_lm_evals_definition(lm) -> None:
    arguments = generation_arguments(lm, [DOUBLE], CodeSettings())
    assert arguments["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    prompt = len(lm.tok_encode(DOUBLE.prompt))
    assert arguments["max_gen_toks"] == max(CONTEXT - prompt, CONTEXT // 2) < 1024
    assert arguments["do_sample"] is False
    sampled = generation_arguments(lm, [DOUBLE], CodeSettings(20, 0.8))
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"]) == (True, 0.8, 0.95)


def test_samples_of_one_problem_differ_and_come_again(lm) -> None:
    problem = Problem("p", "def f(x):\n", "f", "")
    settings = CodeSettings(3, 1.0)
    arguments = generation_arguments(lm, [problem], settings)
    first, again = (complete(lm, [problem, problem], settings, {**arguments, "max_gen_toks": 20}) for _ in range(2))
    assert first == again
    assert len({*first[0], *first[1]}) == 6


def test_every_sample_is_a_request_of_its_own(lm) -> None:
    """A store of answers, which knows requests by their content, cannot take one sample for another."""
    settings = CodeSettings(3, 1.0)
    arguments = generation_arguments(lm, [DOUBLE], settings)
    lm.generate_until = lambda requests: [json.dumps(request.args) for request in requests]
    (texts,) = complete(lm, [DOUBLE], settings, arguments)
    assert len(set(texts)) == 3


def test_several_greedy_completions_are_refused() -> None:
    with pytest.raises(EvalError, match="5 greedy completions of a problem are all the same"):
        CodeSettings(5)


@needs_namespaces
def test_a_models_completions_are_run_and_counted(lm) -> None:
    problems, settings = [DOUBLE, NEAREST], CodeSettings()
    completions = complete(lm, problems, settings, generation_arguments(lm, problems, settings))
    scores = run_and_count(problems, completions, settings, lambda *_: None)
    assert scores.metrics["pass@1"].value == 0
    assert sum(scores.outcomes.values()) == 2
    assert "passed" not in scores.outcomes


def test_without_the_users_word_or_the_whole_data_the_row_says_why(tmp_path: Path, tokenizer) -> None:
    run_dir = save_run(tmp_path / "run", tokenizer)
    write_dataset(tmp_path / "hub", HUB_ID, {CONFIG: {"test": [asdict(DOUBLE), asdict(NEAREST)]}})
    request = EvalRequest(run_dir, ("humaneval",), data_dir=tmp_path / "hub", suites_dir=SUITES)
    (refused,) = run_evals(request, Console(quiet=True))
    assert refused.status == "unavailable"
    assert "--allow-code lets it, in a sandbox" in refused.reason
    with pytest.raises(TaskUnavailableError, match="2 problems, the official number is 164"):
        load_problems(tmp_path / "hub", tmp_path / "cache")


@needs_namespaces
def test_a_run_writes_completions_and_outcomes_and_is_not_made_twice(tmp_path: Path, tokenizer) -> None:
    run_dir = save_run(tmp_path / "run", tokenizer)
    rows = [{**asdict(DOUBLE), "task_id": f"ours/{number}"} for number in range(164)]
    write_dataset(tmp_path / "hub", HUB_ID, {CONFIG: {"test": rows}})
    request = EvalRequest(
        run_dir, ("humaneval",), data_dir=tmp_path / "hub", suites_dir=SUITES, limit=3, allow_code=True
    )
    (result,) = run_evals(request, Console(quiet=True))
    assert (result.status, result.n, result.n_total) == ("ok", 3, 164)
    assert re.fullmatch(r"3 failed; completions have \d+ tokens at most, .* no room for 1024", result.reason)
    assert result.settings["code"] == {"samples": 1, "temperature": 0.0}
    assert f"completions have {result.generation['max_gen_toks']} tokens at most" in result.reason
    folder = run_dir / "evals" / "step_00000010"
    lines = [json.loads(line) for line in (folder / result.samples).read_text().splitlines()]
    assert [(line["doc_id"], line["correct"], line["outcome"]) for line in lines] == [
        (number, False, "failed") for number in range(3)
    ]
    (again,) = run_evals(request, Console(quiet=True))
    assert again.reused


def test_problems_are_items_that_must_not_be_trained_on(tmp_path: Path) -> None:
    rows = [{**asdict(DOUBLE), "task_id": f"ours/{number}"} for number in range(164)]
    write_dataset(tmp_path / "hub", HUB_ID, {CONFIG: {"test": rows}})
    write_items(("humaneval",), tmp_path / "hub", tmp_path / "items.jsonl", SUITES)
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [(line["task"], line["id"]) for line in lines] == [("humaneval", number) for number in range(164)]
    assert lines[0]["texts"] == [(DOUBLE.prompt + DOUBLE.canonical_solution).strip(), DOUBLE.prompt.strip()]


def real_problems() -> list[Problem]:
    return [Problem(**json.loads(line)) for line in gzip.decompress(REAL.read_bytes()).splitlines()]


@with_shared
@needs_namespaces
def test_some_of_the_real_canonical_solutions_pass() -> None:
    problems = [real_problems()[number] for number in (0, 32, 33, 38, 50)]
    attempts = run_attempts(problems, [[problem.canonical_solution] for problem in problems], lambda *_: None)
    assert [attempt.outcome.detail for attempt in attempts] == [""] * 5
    assert all(attempt.passed for attempt in attempts)


@pytest.mark.exhaustive
@with_shared
@needs_namespaces
def test_all_real_canonical_solutions_pass() -> None:
    problems = real_problems()
    attempts = run_attempts(problems, [[problem.canonical_solution] for problem in problems], lambda *_: None)
    assert [problems[a.problem].task_id for a in attempts if not a.passed] == []


@pytest.mark.exhaustive
@with_shared
@needs_namespaces
def test_wrong_solutions_get_the_verdict_of_the_plain_way() -> None:
    """Prompt, completion and tests in one namespace, as the paper's own program runs them: honest code cannot tell."""
    problems = real_problems()
    texts = [["    pass\n", *changed(problem.canonical_solution)] for problem in problems]
    attempts = run_attempts(problems, texts, lambda *_: None)
    different = []
    for attempt in attempts:
        problem = problems[attempt.problem]
        plain = run_program(f"{problem.prompt}{attempt.completion}\n{problem.test}\ncheck({problem.entry_point})\n")
        if attempt.passed != (plain.exit_code == 0):
            different.append((problem.task_id, attempt.completion, attempt.outcome.detail, plain.output[-300:]))
    assert different == []
    verdicts = [attempt.passed for attempt in attempts]
    assert 10 < sum(verdicts) < len(verdicts) - 100, "changes that matter and changes that do not"


def changed(solution: str) -> list[str]:
    """The solution with its first number, comparison or operator another one."""
    changes = [(r"\b1\b", "2"), (r"<", "<="), (r"\+", "-"), (r"\bTrue\b", "False"), (r"\[\]", "()")]
    found = [re.sub(old, new, solution, count=1) for old, new in changes]
    return [text for text in found if text != solution][:2]
