"""`megagpt bench evals`: both backends on the same requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.bench import OURS, THEIRS, Bench, BenchRow
from megagpt.cli import main
from tests.evals.conftest import save_run
from tests.evals.fixtures import write_all


def test_both_backends_are_timed_and_compared_on_the_same_requests(tokenizer, tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "run", tokenizer)
    write_all(tmp_path / "hub")
    tasks = {"mmlu_anatomy": 24, "lambada_openai": 5, "megagpt_smoke_generate": 5}
    words = ["--tasks", "mmlu_anatomy:2:6,lambada_openai,megagpt_smoke_generate", "--limit", "5"]
    words += ["--max-new-tokens", "12"]
    words += ["--checkpoint", str(run_dir), "--data", str(tmp_path / "hub"), "--json", str(tmp_path / "out.json")]
    shown = CliRunner().invoke(main, ["bench", "evals", *words])
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["task"]: row["n_requests"] for row in found["rows"]} == tasks
    assert found["agrees"], shown.output
    assert all(row["seconds"][backend] > 0 for row in found["rows"] for backend in (OURS, THEIRS))
    assert 0 < found["rows"][0]["tokens_computed"] < found["rows"][0]["tokens_naive"]
    assert shown.exit_code == (0 if found["speedup"] >= 3 else 1)  # so small a model says nothing about speed
    assert all(task in shown.output for task in tasks)


@pytest.mark.parametrize("word", ["mmlu:five", "mmlu:5:6:7", ":5"])
def test_a_task_that_is_not_well_said_is_an_error(tokenizer, tmp_path: Path, word: str) -> None:
    run_dir = save_run(tmp_path / "run", tokenizer)
    shown = CliRunner().invoke(main, ["bench", "evals", "--checkpoint", str(run_dir), "--tasks", word])
    assert shown.exit_code == 2
    assert f"'{word}' is not TASK, TASK:SHOTS or TASK:SHOTS:LIMIT" in shown.output


def row(ours: float, theirs: float, difference: float = 0.0, texts: int = 0, *, same: bool = True) -> BenchRow:
    return BenchRow("a_task", 8, {OURS: ours, THEIRS: theirs}, 10, 100, difference, texts, same)


@pytest.mark.parametrize(
    ("rows", "ok"),
    [
        ([row(1.0, 2.0), row(1.0, 4.0)], True),
        ([row(1.0, 2.0), row(1.0, 3.9)], False),
        ([row(1.0, 9.0, difference=2e-4)], False),
        ([row(1.0, 9.0, texts=1)], False),
        ([row(1.0, 9.0, same=False)], False),
    ],
)
def test_it_passes_where_answers_agree_and_all_tasks_together_are_three_times_as_fast(rows, ok) -> None:
    assert Bench(rows, 1, batch_invariant=True).ok is ok
