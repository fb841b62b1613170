"""An instruction-tuned checkpoint's answers, scored from 0 to 100."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from evals.judge.ask import FAILED, Judgement
from evals.judge.choose import JudgeOptions
from evals.judged_answers import AnswersRequest, Row, ScoredRow, extremes, load_rows, parse_score, run_answers
from evals.judged_model import ModelRequest
from evals.lines import read_lines
from megagpt.cli import main
from megagpt.errors import EvalError
from tests.evals.conftest import save_run
from tests.evals.judge_server import judge_server

ROWS = [
    {"instruction": f"Name a word with {n}.", "input": "of letters" if n % 2 else "", "output": f"right {n}"}
    for n in range(6)
]


@pytest.fixture
def run_dir(tmp_path: Path, tokenizer) -> Path:
    return save_run(tmp_path / "tuned", tokenizer)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test.json"
    path.write_text(json.dumps(ROWS))
    return path


def request_for(run_dir: Path, file: Path, url: str, **changes) -> AnswersRequest:
    judge = JudgeOptions(url, model="m", tries=1)
    model = ModelRequest(run_dir, template="alpaca", batch_size=4)
    return AnswersRequest(model, file, judge, **{"max_new_tokens": 12, **changes})


def reply(_, text):
    number = int(text.split("right ")[1][0])
    return 200, {}, "I cannot say" if number == 0 else str(10 * number)


def test_answers_are_scored_against_the_right_ones(run_dir: Path, file: Path) -> None:
    with judge_server(reply) as asked:
        result, scored = run_answers(request_for(run_dir, file, asked.url), lambda *_: None)
        again, _ = run_answers(request_for(run_dir, file, asked.url), lambda *_: None)
        assert len(asked.bodies) == 6
    assert again.metrics == result.metrics
    assert result.metrics["score"].value == 30
    low, high = result.metrics["score"].ci95
    assert 10 <= low < 30 < high <= 50
    assert result.reason == "1 of 6 judgements have no score and are left out"
    worst, best = extremes(scored, 3)
    assert [one.score for one in worst] == [10, 20, 30]
    assert [one.score for one in best] == [50, 40]
    folder = run_dir / "evals" / "step_00000010"
    stored = read_lines(folder / "answers_test.answers.jsonl")
    assert [row["response"] for row in stored] == [one.response for one in scored]
    prompt = next(text for text in asked.prompts if "right 3" in text)
    assert "Name a word with 3.\n\nof letters" in prompt
    assert scored[3].response in prompt


def test_answers_that_do_not_say_which_code_made_them_are_made_again_and_told(run_dir: Path, file: Path) -> None:
    """As files were before the code was part of an answer's identity."""
    path = run_dir / "evals" / "step_00000010" / "answers_test.answers.jsonl"
    with judge_server(reply) as asked:
        run_answers(request_for(run_dir, file, asked.url), lambda *_: None)
        old = [{**row, "identity": row.pop("identity_without_code"), "response": "old"} for row in read_lines(path)]
        path.write_text("".join(json.dumps(row) + "\n" for row in old))
        result, scored = run_answers(request_for(run_dir, file, asked.url), lambda *_: None)
    assert "6 stored answers were made by other code or another tokenizer: answered again" in result.reason
    assert "old" not in {one.response for one in scored}
    assert result.settings["judge_settings"]["server"] == asked.url


def test_a_row_is_shown_to_the_model_in_its_template(run_dir: Path, file: Path, monkeypatch) -> None:
    from evals.judged_answers import _user_text

    assert _user_text(Row(0, "do", "with", ""), "alpaca") == "do\n\n### Input:\nwith"
    assert _user_text(Row(0, "do", "", ""), "alpaca") == "do"
    assert _user_text(Row(0, "do", "with", ""), "plain") == "do\nwith"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("85", 85),
        (" 85.\n", 85),
        ("Score: 85", 85),
        ("**85**", 85),
        ("85/100", 85),
        ("85.0", 85),
        ("It is good. [[70]]", 70),
        ("0", 0),
        ("100", 100),
        ("101", FAILED),
        ("The 3 letters are right", FAILED),
        ("85 or 90", FAILED),
        ("", FAILED),
    ],
)
def test_scores_are_read_only_where_they_are_scores(text: str, score: float) -> None:
    assert parse_score(text) == score


def test_no_answer_is_both_worst_and_best() -> None:
    scored = [ScoredRow(Row(n, "", "", ""), "", Judgement(n, 1, "", float(n)), truncated=False) for n in range(3)]
    worst, best = extremes(scored, 3)
    assert ([one.score for one in worst], [one.score for one in best]) == ([0, 1], [2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "at least one"),
        ("{}", "expected a list of rows"),
        ("[3]", "row 0 is int"),
        ('[{"instruction": "a"}]', "row 0: output must be text"),
        ("[", "cannot be read as JSON"),
    ],
)
def test_a_damaged_set_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(EvalError, match=message):
        load_rows(path)


def test_json_lines_are_the_same_rows(tmp_path: Path, file: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert load_rows(path) == load_rows(file)


def test_the_command_shows_mean_interval_worst_and_best(run_dir: Path, file: Path) -> None:
    words = ["eval", "answers", "--checkpoint", run_dir, "--file", file, "--judge-model", "m", "--max-new-tokens", "8"]
    with judge_server(reply) as asked:
        found = CliRunner().invoke(main, [*map(str, words), "--judge", asked.url])
    assert found.exit_code == 0, found.output
    assert "30.0000" in found.output
    assert "worst 10: Name a word with 1." in found.output
    assert "best 50: Name a word with 5." in found.output
    assert "1 of 6 judgements have no score" in found.output
