"""`megagpt bench evals`: both backends, from documents to scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evals.bench import Bench, BenchRow, make_row
from evals.bench_measure import OURS, THEIRS, Measurement, Seconds
from megagpt.cli import main
from tests.evals.conftest import save_run
from tests.evals.fixtures import write_all

WORDS = ["--tasks", "mmlu_anatomy:2:6,lambada_openai,megagpt_smoke_generate", "--limit", "5", "--max-new-tokens", "12"]
N_REQUESTS = {"mmlu_anatomy": 24, "lambada_openai": 5, "megagpt_smoke_generate": 5}


def run(folder: Path, *words: str) -> Result:
    paths = ["--checkpoint", str(folder / "run"), "--data", str(folder / "hub"), "--json", str(folder / "out.json")]
    return CliRunner().invoke(main, ["bench", "evals", *WORDS, *paths, *words])


def test_both_backends_are_timed_and_compared_and_an_ended_benchmark_goes_on(tokenizer, tmp_path: Path) -> None:
    save_run(tmp_path / "run", tokenizer)
    write_all(tmp_path / "hub")
    lines = tmp_path / "lines.jsonl"
    shown = run(tmp_path, "--lines", str(lines))
    found = json.loads((tmp_path / "out.json").read_text())
    assert {row["task"]: row["n_requests"] for row in found["rows"]} == N_REQUESTS
    assert found["agrees"], shown.output
    assert all(row["same_requests"] for row in found["rows"])
    for backend in (OURS, THEIRS):
        parts = [row["seconds"][backend] for row in found["rows"]]
        assert all(each[part] > 0 for each in parts for part in ("requests", "answers", "metrics"))
        assert found["seconds"][backend]["answers"] == pytest.approx(sum(each["answers"] for each in parts))
    assert 0 < found["rows"][0]["tokens_computed"] < found["rows"][0]["tokens_naive"]
    assert found["rows"][2]["tokens_naive"] > 5 * 2  # prompts and texts
    assert shown.exit_code == (0 if found["speedup"] >= 3 else 1)  # so small a model says nothing about speed
    assert all(task in shown.output for task in N_REQUESTS)

    whole = lines.read_text()
    assert len(whole.splitlines()) == 1 + 2 * 3
    lines.write_text(whole[: whole.rindex('{"measurement"') + 200])  # killed while it wrote the last one
    again = run(tmp_path, "--lines", str(lines))
    assert again.output.count("known: ") == 5
    assert [json.loads(line)["measurement"]["backend"] for line in lines.read_text().splitlines()[1:]] == [
        OURS,
        THEIRS,
    ] * 3
    resumed = json.loads((tmp_path / "out.json").read_text())
    assert resumed["rows"][:2] == found["rows"][:2]
    assert resumed["agrees"]

    other = run(tmp_path, "--lines", str(lines), "--batch-size", "3")
    assert other.exit_code == 2
    assert "measured with batch_size 16, now it is 3" in other.output
    lines.write_text('{"a": 1}\n')
    assert "not the lines of `megagpt bench evals`" in run(tmp_path, "--lines", str(lines)).output


def test_a_task_generates_as_much_as_its_definition_says(tokenizer, tmp_path: Path) -> None:
    save_run(tmp_path / "run", tokenizer)
    write_all(tmp_path / "hub")
    words = ["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "hub"), "--tasks", "gsm8k:0:1"]
    shown = CliRunner().invoke(main, ["bench", "evals", *words])
    assert shown.exit_code == 2
    assert "gsm8k generates 256 tokens, but the model's context is 192" in " ".join(shown.output.split())


@pytest.mark.parametrize("word", ["mmlu:five", "mmlu:5:6:7", ":5"])
def test_a_task_that_is_not_well_said_is_an_error(tokenizer, tmp_path: Path, word: str) -> None:
    run_dir = save_run(tmp_path / "run", tokenizer)
    shown = CliRunner().invoke(main, ["bench", "evals", "--checkpoint", str(run_dir), "--tasks", word])
    assert shown.exit_code == 2
    assert f"'{word}' is not TASK, TASK:SHOTS or TASK:SHOTS:LIMIT" in shown.output


def row(ours: float, theirs: float, difference: float = 0.0, texts: int = 0, *, same: bool = True) -> BenchRow:
    seconds = {OURS: Seconds(0.1, ours - 0.2, 0.1), THEIRS: Seconds(0.5, theirs - 0.7, 0.2)}
    return BenchRow("a_task", 8, seconds, 10, 100, difference, texts, [] if same else ["acc: 0.1 and 0.2"])


@pytest.mark.parametrize(
    ("rows", "ok"),
    [
        ([row(1.0, 2.0), row(1.0, 4.0)], True),
        ([row(1.0, 2.0), row(1.0, 3.9)], False),
        ([row(1.0, 9.0, difference=2e-4)], False),
        ([row(1.0, 9.0, texts=1)], False),
        ([row(1.0, 9.0, same=False)], False),
        ([replace(row(1.0, 9.0), same_requests=False)], False),
    ],
)
def test_it_passes_where_answers_agree_and_all_tasks_together_are_three_times_as_fast(rows, ok) -> None:
    assert Bench(rows, 1, batch_invariant=True).ok is ok


def measured(backend: str, number: int, seconds: float, **changed: object) -> Measurement:
    found = Measurement(
        asked="a_task:None:None",
        data="abc",
        backend=backend,
        round=number,
        seconds=Seconds(1.0, seconds, 1.0),
        n_requests=2,
        requests="a hash",
        answers=[[[-1.0, True], [-2.0, False]], ["a text"]],
        scores={"a_task": {"acc,none": 0.5, "nan,none": float("nan"), "sample_len": 2}},
    )
    return replace(found, **changed)


def test_a_row_takes_each_backends_fastest_round_and_names_what_differs() -> None:
    rounds = [measured(OURS, 0, 5.0), measured(THEIRS, 0, 9.0), measured(OURS, 1, 4.0), measured(THEIRS, 1, 10.0)]
    found = make_row("a_task", rounds)
    assert (found.seconds[OURS].total, found.seconds[THEIRS].total) == (6.0, 11.0)
    assert Bench([found], 1, batch_invariant=True).agrees

    answers = [[[-1.0, True], [-2.5, False]], ["another text"]]
    scores = {"a_task": {"acc,none": 1.0, "nan,none": float("nan"), "sample_len": 2}}
    found = make_row("a_task", [rounds[0], measured(THEIRS, 0, 9.0, answers=answers, scores=scores)])
    assert (found.largest_difference, found.n_other_texts) == (0.5, 1)
    assert found.differences == ["a_task acc,none: 0.5 and 1.0"]

    found = make_row("a_task", [*rounds[:3], measured(THEIRS, 1, 99.0, requests="another hash")])
    assert not found.same_requests  # whichever round it was in
