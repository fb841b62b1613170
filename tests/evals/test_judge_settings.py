"""What decides a judgement: it is kept with it, names the judge in the result, and is nothing that shares its batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals.backend import MegaGPTLM
from evals.chat import TEMPLATES
from evals.judge.ask import JudgementFile, JudgeRequest
from evals.judge.choose import JudgeOptions, open_judge
from evals.judge.http import ServerJudge, ServerSettings
from evals.judge.local import LEAST_TOKENS, CheckpointJudge
from evals.judge.replay import ReplayJudge
from evals.lines import append_line, read_lines
from evals.mt_bench.rating import parse_rating
from megagpt.checkpoint.open import open_checkpoint
from megagpt.errors import EvalError
from tests.evals.conftest import save_run, scaled_up
from tests.evals.judge_server import judge_server

KEY = "sk-very-secret"
REQUESTS = [JudgeRequest(number, 1, "single-v1", "be fair", f"judge {number}") for number in (1, 2)]
CONTEXT = 384


def judgement_file(path: Path, judge) -> JudgementFile:
    return JudgementFile(path, "a", judge, parse_rating)


def texts(path: Path, judge, requests=REQUESTS) -> list[str]:
    return [found.text for found in judgement_file(path, judge).judge_all(requests, lambda *_: None)]


def server(url: str, model: str = "m") -> ServerJudge:
    return ServerJudge(url, ServerSettings(model, timeout_seconds=5, tries=1), KEY)


@pytest.fixture(scope="module")
def long_model():
    return scaled_up("gpt2", max_seq_len=CONTEXT)[0]


def test_another_chat_format_of_the_same_checkpoint_is_asked_anew(long_model, tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    lm = MegaGPTLM(long_model, tokenizer, max_seq_len=CONTEXT, batch_size=4)
    plain, alpaca = (CheckpointJudge(lm, "checkpoint 0", TEMPLATES[name]) for name in ("plain", "alpaca"))
    first = texts(path, plain)
    assert texts(path, alpaca, REQUESTS[:1]) != first[:1]
    assert len(read_lines(path)) == 3
    assert texts(path, plain) == first
    assert len(read_lines(path)) == 3, "and of both the file knows which is which"


def test_a_model_of_the_same_name_on_another_server_is_asked_anew(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with judge_server(lambda *_: (200, {}, "[[2]]")) as one, judge_server(lambda *_: (200, {}, "[[9]]")) as other:
        assert texts(path, server(one.url)) == ["[[2]]"] * 2
        assert texts(path, server(other.url)) == ["[[9]]"] * 2
        assert texts(path, server(one.url + "/")) == ["[[2]]"] * 2
    assert {row["judge_settings"]["server"] for row in read_lines(path)} == {one.url, other.url}
    assert KEY not in path.read_text()


def test_another_replayed_file_is_not_answered_from_the_first(tmp_path: Path) -> None:
    judges = []
    for name, text in (("one", "[[2]]"), ("two", "[[9]]")):
        for request in REQUESTS:
            row = {"question_id": request.question_id, "turn": 1, "model": "a", "judge": ["gpt-4", "single-v1"]}
            append_line(tmp_path / name, {**row, "user_prompt": request.user, "judgment": text})
        judges.append(ReplayJudge(tmp_path / name, parse_rating))
    assert [texts(tmp_path / "j.jsonl", judge) for judge in judges] == [["[[2]]"] * 2, ["[[9]]"] * 2]


def test_lines_that_do_not_say_how_they_were_made_are_not_used_and_told_once(tmp_path: Path) -> None:
    """As files of FastChat and of older versions have them: the judge's name alone."""
    path = tmp_path / "j.jsonl"
    with judge_server(lambda *_: (200, {}, "[[3]]")) as asked:
        judge = server(asked.url)
        for request in REQUESTS:
            row = {"question_id": request.question_id, "turn": 1, "model": "a", "judge": ["m", "single-v1"]}
            append_line(path, {**row, "user_prompt": request.user, "system_prompt": "be fair", "judgment": "[[8]]"})
        file = judgement_file(path, judge)
        assert [found.score for found in file.judge_all(REQUESTS, lambda *_: None)] == [3, 3]
        assert file.told() == ["2 stored judgements do not say how they were made: judged again"]
        again = judgement_file(path, judge)
        assert [found.score for found in again.judge_all(REQUESTS, lambda *_: None)] == [3, 3]
        assert again.told() == []
    rows = read_lines(path)
    assert [row["judgment"] for row in rows] == ["[[8]]", "[[8]]", "[[3]]", "[[3]]"]
    fastchats = {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"}
    assert fastchats <= set(rows[-1])
    assert rows[-1]["judge"] == ["m", "single-v1"]


def test_judgements_of_other_code_are_made_again_and_told(lm: MegaGPTLM, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    texts(path, CheckpointJudge(lm, "checkpoint 0", TEMPLATES["plain"], {"code": "before"}), REQUESTS[:1])
    file = judgement_file(path, CheckpointJudge(lm, "checkpoint 0", TEMPLATES["plain"], {"code": "now"}))
    file.judge_all(REQUESTS[:1], lambda *_: None)
    assert len(read_lines(path)) == 2
    assert file.told() == ["1 stored judgements were made by other code: judged again"]


@pytest.mark.parametrize(
    "url",
    [
        f"http://someone:{KEY}@127.0.0.1:9/v1",
        f"https://127.0.0.1:9/v1?api_key={KEY}",
        f"https://{KEY}@h/v1",
        f"https://h/v1#{KEY}",
    ],
)
def test_an_address_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    options = JudgeOptions(url, model="m")
    with pytest.raises(EvalError, match=r"user, a password or a query .*--judge-key-env") as caught:
        open_judge(options, parse_rating)
    assert KEY not in str(caught.value)
    assert KEY not in repr(options)
    with pytest.raises(EvalError, match="names no host"):
        open_judge(JudgeOptions("http:///v1", model="m"), parse_rating)


def test_a_checkpoint_that_judges_is_named_with_weights_precision_chat_format_and_length(
    tmp_path: Path, tokenizer
) -> None:
    run_dir = save_run(tmp_path / "judge", tokenizer)
    settings = open_judge(JudgeOptions(f"checkpoint:{run_dir}", template="alpaca"), parse_rating).settings
    assert settings["weights"] == open_checkpoint(run_dir).hash
    assert settings["tokenizer"] == tokenizer.fingerprint
    assert (settings["dtype"], settings["template"], settings["max_tokens"]) == ("fp32", "alpaca", 2048)
    assert settings["arithmetic"] == "row-invariant", "so that no batch changes a judgement's last digits"
    assert len(settings["code"]) == 64
    assert open_judge(
        JudgeOptions(f"checkpoint:{run_dir}", template="alpaca", batch_size=1), parse_rating
    ).settings == (settings), "a batch of another size is no other judge"
    with pytest.raises(EvalError, match="template 'chat' is none; known are plain, alpaca"):
        open_judge(JudgeOptions(f"checkpoint:{run_dir}", template="chat"), parse_rating)


def long_requests(judge: CheckpointJudge) -> list[JudgeRequest]:
    """Prompts that leave from 208 down to 130 tokens for a judgement, the longest among the others."""
    lengths = [176, 254, 200, 178]
    requests = []
    for number, length in enumerate(lengths):
        text = f"rate {number}"
        while len(judge.lm.tok_encode(judge.template.prompt([(f"{text} a", None)]))) <= length:
            text += " a"
        requests.append(JudgeRequest(number, 1, "p", "", text))
    return requests


def test_a_judgement_does_not_depend_on_its_neighbours(long_model, tokenizer, tmp_path: Path) -> None:
    judges = {
        size: CheckpointJudge(
            MegaGPTLM(long_model, tokenizer, max_seq_len=CONTEXT, batch_size=size), "checkpoint 0", TEMPLATES["plain"]
        )
        for size in (1, 8)
    }
    requests = long_requests(judges[1])
    alone = texts(tmp_path / "1.jsonl", judges[1], requests)
    assert texts(tmp_path / "8.jsonl", judges[8], requests[1:3]) == alone[1:3]
    assert texts(tmp_path / "8.jsonl", judges[8], requests) == alone, "whatever an earlier call has judged"
    lengths = [len(tokenizer.encode(text)) for text in alone]
    assert lengths[0] > lengths[1] + 32, "each goes on as far as its own prompt leaves room"


def test_too_little_room_for_a_judgement_is_refused_before_anything_is_asked(
    long_model, tokenizer, tmp_path: Path
) -> None:
    lm = MegaGPTLM(long_model, tokenizer, max_seq_len=CONTEXT, batch_size=2)
    judge = CheckpointJudge(lm, "checkpoint 0", TEMPLATES["plain"])
    requests = [*long_requests(judge)[:1], JudgeRequest(7, 2, "p", "", "a " * (CONTEXT - LEAST_TOKENS))]
    with pytest.raises(EvalError, match=rf"question 7 turn 2 has \d+ tokens, .*needs room for {LEAST_TOKENS}"):
        texts(tmp_path / "j.jsonl", judge, requests)
    assert read_lines(tmp_path / "j.jsonl") == []
