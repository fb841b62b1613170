"""Judges: servers that fail in all ways, replayed files, checkpoints; and the file that judgements are kept in."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from evals.chat import TEMPLATES
from evals.judge.ask import FAILED, JudgementFile, JudgeRequest
from evals.judge.choose import JudgeOptions, open_judge
from evals.judge.http import ServerJudge, ServerSettings
from evals.judge.local import CheckpointJudge
from evals.judge.replay import ReplayJudge
from evals.lines import append_line, read_lines
from evals.mt_bench.rating import parse_rating
from megagpt.errors import EvalError
from tests.evals.judge_server import judge_server

KEY = "sk-very-secret"
REQUESTS = [
    JudgeRequest(number, turn, "single-v1", "be fair", f"judge {number}.{turn}") for number in (1, 2) for turn in (1, 2)
]


def server_judge(url: str, waits: list[float] | None = None, **settings) -> ServerJudge:
    sleep = (waits if waits is not None else []).append
    return ServerJudge(url, ServerSettings("m", timeout_seconds=5, **settings), KEY, sleep)


def ask(judge, path: Path, requests=REQUESTS, model_id: str = "a"):
    return JudgementFile(path, model_id, judge, parse_rating).judge_all(requests, lambda *_: None)


def test_a_server_is_asked_as_openais_and_judgements_come_in_order(tmp_path: Path) -> None:
    def reply(number, text):
        time.sleep(0.05 if "1.1" in text else 0)  # the first is answered last
        return 200, {}, f"Rating: [[{text[-1]}]] of {text}"

    with judge_server(reply) as asked:
        found = ask(server_judge(asked.url), tmp_path / "j.jsonl")
    assert [(one.question_id, one.turn, one.score) for one in found] == [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2)]
    assert set(asked.paths) == {"/v1/chat/completions"}
    body = next(body for body in asked.bodies if body["messages"][1]["content"] == "judge 1.1")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 2048)
    assert body["messages"][0] == {"role": "system", "content": "be fair"}
    assert {headers["Authorization"] for headers in asked.headers} == {f"Bearer {KEY}"}


def test_judgements_are_kept_in_fastchats_format_and_not_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with judge_server(lambda *_: (200, {}, "[[7]]")) as asked:
        first = ask(server_judge(asked.url), path)
        again = ask(server_judge(asked.url), path)
        assert len(asked.bodies) == 4
        other_answer = [JudgeRequest(1, 1, "single-v1", "be fair", "judge another answer")]
        ask(server_judge(asked.url), path, other_answer)
        ask(server_judge(asked.url), path, model_id="b")
        assert len(asked.bodies) == 9, "another answer or another model is judged anew"
        ask(server_judge(asked.url), path, [JudgeRequest(1, 1, "single-v1", "be stern", "judge 1.1")])
        assert len(asked.bodies) == 10, "and so is the same with other words before it"
    assert first == again
    row = read_lines(path)[0]
    fastchats = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert set(row) == fastchats | {"system_prompt", "judge_settings"}
    assert (row["model"], row["judge"], row["score"]) == ("a", ["m", "single-v1"], 7)
    assert KEY not in path.read_text()


def test_what_passes_is_tried_again_and_waits_as_long_as_the_server_says(tmp_path: Path) -> None:
    replies = [(429, {"Retry-After": "7"}, {}), (503, {}, {}), (200, {}, b"not json"), (200, {}, {"choices": []})]
    waits: list[float] = []
    with judge_server(lambda n, _: replies[n] if n < 4 else (200, {}, "[[9]]")) as asked:
        (found,) = ask(server_judge(asked.url, waits, tries=5), tmp_path / "j", REQUESTS[:1])
    assert found.score == 9
    assert waits == [7, 2, 4, 8]


def test_a_judge_that_fails_for_good_leaves_what_was_judged_and_never_tells_the_key(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"

    def reply(number, text):
        refused = (401, {}, {"error": f"Incorrect API key provided: {KEY}"})
        return refused if number == 2 else (200, {}, "[[5]]" if number < 2 else "[[6]]")

    with judge_server(reply) as asked:
        judge = server_judge(asked.url, parallel=1)
        with pytest.raises(
            EvalError, match=r"HTTP 401.*\[key\].*2 of 4 judgements are in .*the same command goes on"
        ) as caught:
            ask(judge, path)
        assert len(asked.bodies) == 3, "a refusal is not tried again, and nothing after it is sent"
        found = ask(server_judge(asked.url), path)
        assert len(asked.bodies) == 5
    assert KEY not in str(caught.value)
    assert KEY not in repr(judge)
    assert sorted(one.score for one in found) == [5, 5, 6, 6]


def test_a_judge_that_is_not_there_is_told_after_its_tries(tmp_path: Path) -> None:
    waits: list[float] = []
    with pytest.raises(EvalError, match=r"judge http://127\.0\.0\.1:9/v1: .*refused.* \(3 tries\)"):
        ask(server_judge("http://127.0.0.1:9/v1", waits, tries=3), tmp_path / "j", REQUESTS[:1])
    assert waits == [1, 2]


def test_a_silent_judge_is_not_waited_for_longer_than_said(tmp_path: Path) -> None:
    def reply(number, text):
        time.sleep(0.6)
        return 200, {}, "[[1]]"

    with judge_server(reply) as asked:
        judge = ServerJudge(asked.url, ServerSettings("m", timeout_seconds=0.2, tries=1))
        with pytest.raises(EvalError, match=r"timed out|TimeoutError"):
            ask(judge, tmp_path / "j", REQUESTS[:1])


def test_a_redirect_does_not_carry_the_key_elsewhere(tmp_path: Path) -> None:
    with judge_server(lambda *_: (200, {}, "[[1]]")) as other:
        moved = (302, {"Location": f"{other.url}/chat/completions"}, {})
        with judge_server(lambda *_: moved) as asked, pytest.raises(EvalError, match="HTTP 302"):
            ask(server_judge(asked.url), tmp_path / "j", REQUESTS[:1])
        assert other.paths == []


def replay_rows(**changes) -> list[dict]:
    return [
        {
            "question_id": r.question_id,
            "turn": r.turn,
            "model": "old",
            "judge": ["gpt-4", "single-v1"],
            "user_prompt": r.user,
        }
        | {"judgment": "good [[8]]", "score": 8}
        | changes
        for r in REQUESTS
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_judgements_of_fastchats_file_are_replayed(tmp_path: Path) -> None:
    judge = ReplayJudge(write_rows(tmp_path / "old.jsonl", replay_rows()), parse_rating)
    assert judge.name == "replayed: gpt-4"
    assert [one.score for one in ask(judge, tmp_path / "new.jsonl")] == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_prompt": "another answer"}, "was made for another answer"),
        ({"score": 3}, "score is 3, but the judgement's text says 8.0"),
        ({"judgment": None}, "judgment is NoneType, expected text"),
        ({"turn": 1}, "question 1 turn 1 is judged twice"),
        ({"question_id": "81"}, "question_id is '81' in a line"),
        ({"question_id": 9, "turn": 1}, "is judged twice"),
    ],
)
def test_a_replayed_judgement_of_something_else_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_rows(tmp_path / "old.jsonl", replay_rows(**changes))
    with pytest.raises(EvalError, match=message):
        ask(ReplayJudge(path, parse_rating), tmp_path / "new.jsonl")


def test_a_replayed_file_of_several_models_must_be_told_which(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "old.jsonl", [*replay_rows(), *replay_rows(model="new", judgment="[[2]]", score=2)])
    with pytest.raises(EvalError, match="judgements of new, old; name one with --judge-model"):
        ReplayJudge(path, parse_rating)
    assert ask(ReplayJudge(path, parse_rating, "new"), tmp_path / "j")[0].score == 2
    with pytest.raises(EvalError, match="question 1 turn 1: there is no judgement"):
        ask(ReplayJudge(write_rows(tmp_path / "none.jsonl", []), parse_rating), tmp_path / "k")


def test_a_checkpoint_judges_greedily_and_refuses_what_it_cannot_read_whole(lm, tmp_path: Path) -> None:
    judge = CheckpointJudge(lm, "checkpoint 0", TEMPLATES["plain"])
    short = [JudgeRequest(number, 1, "p", "", f"rate {number}") for number in range(6)]
    found = ask(judge, tmp_path / "j", short)
    assert found == ask(judge, tmp_path / "k", short)
    assert all(one.score == FAILED for one in found), "a random model writes no rating"
    with pytest.raises(
        EvalError, match=r"question 3 turn 1 has \d+ tokens, its context holds 192; take a larger judge"
    ):
        ask(judge, tmp_path / "l", [JudgeRequest(3, 1, "p", "", "word " * 400)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (JudgeOptions("gpt-4"), r"judge 'gpt-4' is none; expected http://HOST/v1"),
        (JudgeOptions("http://h/v1"), "say which model of that server with --judge-model"),
        (JudgeOptions("replay:/nowhere/x"), "/nowhere/x: no such file of judgements"),
    ],
)
def test_a_judge_that_is_none_is_refused(options: JudgeOptions, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        open_judge(options, parse_rating)
    assert KEY not in repr(JudgeOptions("x", key=KEY))


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Fine. Rating: [[7]]", 7),
        ("[[6.5]] and then [[9]]", 6.5),
        ("see [1], so [[4]]", 4),
        ("Rating: [3]", 3),
        ("Rating: 8", FAILED),
        ("[[eight]]", FAILED),
        ("[[11]]", FAILED),
        ("[[0]]", FAILED),
        ("", FAILED),
    ],
)
def test_ratings_are_read_with_two_patterns(text: str, rating: float) -> None:
    assert parse_rating(text) == rating


def test_a_line_that_a_kill_cut_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    append_line(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    assert read_lines(path) == [{"a": 1}]
    append_line(path, {"c": 3})
    assert read_lines(path) == [{"a": 1}, {"c": 3}]
    path.write_text('{"a": 1}\n[]\n')
    with pytest.raises(EvalError, match=r"x\.jsonl:2: list where a JSON object"):
        read_lines(path)
