"""MT-Bench from data to result, on questions written here; the real files where they are."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from evals.chat import TEMPLATES
from evals.judge.ask import FAILED, Judgement
from evals.judge.choose import JudgeOptions
from evals.judged_model import JudgedModel, ModelRequest
from evals.lines import append_line, read_lines
from evals.mt_bench import data as mt_data
from evals.mt_bench.answers import Answer, AnswerSettings, to_row
from evals.mt_bench.data import TEMPERATURES, WRONG_REFERENCES, describe, load_benchmark
from evals.mt_bench.pairwise import run_pairwise
from evals.mt_bench.run import judge_requests, run_mt_bench
from evals.mt_bench.scores import bootstrap_metric, score
from evals.mt_bench.setting import MTBenchRequest, answer_settings, first_of_each
from evals.results import TaskResult
from megagpt.cli import main
from megagpt.errors import EvalError
from tests.evals.conftest import SHARED, save_run
from tests.evals.judge_server import judge_server

ORDER = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def write_benchmark(folder: Path, *, official_prompts: bool = False) -> Path:
    """80 questions of our own with the official numbers: 101 to 130 need references."""
    rows = [{"question_id": 81 + i, "category": ORDER[i // 10], "turns": [f"ask {i}?", f"and {i}?"]} for i in range(80)]
    references = [
        {"question_id": n, "choices": [{"index": 0, "turns": [f"right {n} a", f"right {n} b"]}]}
        for n in range(101, 131)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reference_answer").mkdir(exist_ok=True)
    write(folder / "question.jsonl", rows)
    write(folder / "reference_answer" / "gpt-4.jsonl", references)
    if official_prompts:
        names = ["single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn"]
        names += ["pair-v2", "pair-math-v1", "pair-v2-multi-turn", "pair-math-v1-multi-turn"]
        fields = ["{question}|{answer}", "{question}|{answer}|{ref_answer_1}", "{question_2}|{answer_1}|{answer_2}"]
        fields += ["{answer_2}|{ref_answer_2}", *["{answer_a}|{answer_b}"] * 2, *["{answer_a_2}|{answer_b_2}"] * 2]
        write(
            folder / "judge_prompts.jsonl",
            [{"name": n, "system_prompt": "sys", "prompt_template": f} for n, f in zip(names, fields, strict=True)],
        )
    return folder


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(tmp_path_factory.mktemp("data") / "mt_bench").parent


@pytest.fixture
def run_dir(tmp_path: Path, tokenizer) -> Path:
    return save_run(tmp_path / "chat", tokenizer)


def request_for(run_dir: Path, data: Path, url: str, **changes) -> MTBenchRequest:
    judge = JudgeOptions(url, model="m", tries=1)
    return MTBenchRequest(ModelRequest(run_dir), data, judge, **{"limit": 1, **changes})


def prefill(run: Path, data: Path, text: str = "an answer", limit: int = 1, **changes: str) -> Path:
    """Answers as an earlier call left them: what is judged and how is then the subject alone."""
    model = JudgedModel(ModelRequest(run))
    settings = replace(answer_settings(model), **changes)
    path = model.out / "mt_bench.answers.jsonl"
    for question in first_of_each(load_benchmark(data).questions, limit):
        answer = Answer(question.question_id, (text, text), truncated=False)
        append_line(path, to_row(question, answer, settings, model.model_id))
    return run


def go(request: MTBenchRequest) -> TaskResult:
    return run_mt_bench(request, lambda *_: None)


def test_answers_are_stored_and_judged_and_scored(run_dir: Path, benchmark: Path) -> None:
    def reply(number, text):
        if "[Second question]" in text:
            return 200, {}, "no number here" if "and 0?" in text else "[[2]]"
        return 200, {}, "Rating: [[8]]"

    with judge_server(reply) as asked:
        result = go(request_for(run_dir, benchmark, asked.url))
        calls = len(asked.bodies)
    assert calls == 16
    assert (result.n, result.n_total) == (8, 80)
    assert (result.metrics["turn_1"].value, result.metrics["turn_2"].value) == (8, 2)
    assert result.metrics["average"].value == pytest.approx((8 * 8 + 7 * 2) / 15)
    assert "1 of 16 judgements have no rating and are left out" in result.reason
    assert "megagpt's own prompts: not comparable" in result.reason
    assert list(result.subtasks) == list(ORDER)
    assert set(result.subtasks["writing"]["metrics"]) == {"average", "turn_1"}, "its second turn has no rating"
    assert result.settings["template_text"] == "User: ...\n\nAssistant:"
    assert result.settings["temperatures"] == TEMPERATURES
    judge = result.settings["judge_settings"]
    assert (judge["server"], judge["model"], judge["max_tokens"]) == (asked.url, "m", 2048)
    assert {"answers_code", "tokenizer"} <= set(result.settings)
    folder = run_dir / "evals" / "step_00000010"
    assert TaskResult.read(folder / "mt_bench.json").metrics == result.metrics
    answers = read_lines(folder / "mt_bench.answers.jsonl")
    assert sorted(row["question_id"] for row in answers) == [81 + 10 * i for i in range(8)]
    assert all(len(row["choices"][0]["turns"]) == 2 for row in answers)
    samples = read_lines(folder / result.samples)
    assert len(samples) == 16
    assert samples[0]["metrics"] == {"rating": 8}
    assert samples[1]["metrics"] == {}


def test_the_same_command_neither_answers_nor_asks_again(run_dir: Path, benchmark: Path) -> None:
    folder = run_dir / "evals" / "step_00000010"
    prefill(run_dir, benchmark)
    with judge_server(lambda *_: (200, {}, "[[5]]")) as asked:
        first = go(request_for(run_dir, benchmark, asked.url))
        stored = (folder / "mt_bench.answers.jsonl").read_bytes()
        again = go(request_for(run_dir, benchmark, asked.url))
        assert len(asked.bodies) == 16
        assert (folder / "mt_bench.answers.jsonl").read_bytes() == stored
        assert again.metrics == first.metrics


def test_an_answer_is_known_by_all_that_decides_it() -> None:
    question = mt_data.Question(1, "writing", ("a", "b"), None)
    settings = AnswerSettings("hash", "fp32", TEMPLATES["plain"], 10, "tokenizer", "code")
    others = [
        replace(settings, checkpoint_hash="other"),
        replace(settings, dtype="bf16"),
        replace(settings, template=TEMPLATES["alpaca"]),
        replace(settings, max_new_tokens=11),
        replace(settings, seed=1),
        replace(settings, tokenizer="other"),
        replace(settings, code="other"),
    ]
    known = {found.identity(question) for found in (settings, *others)}
    assert len(known) == 8
    assert settings.identity(replace(question, turns=("a", "c"))) not in known


def test_answers_of_other_code_are_made_again_and_that_is_told(run_dir: Path, benchmark: Path) -> None:
    """Before the code was part of it, an answer's identity was what is now called the identity without code."""
    path = run_dir / "evals" / "step_00000010" / "mt_bench.answers.jsonl"
    prefill(run_dir, benchmark, "of other code", code="other")
    rows = read_lines(path)
    old = [{**row, "identity": row.pop("identity_without_code")} for row in rows[:4]]
    write(path, [*old, *rows[4:]])
    told = "8 stored answers were made by other code or another tokenizer: answered again"
    with judge_server(lambda *_: (200, {}, "[[5]]")) as asked:
        result = go(request_for(run_dir, benchmark, asked.url))
        assert not any("of other code" in text for text in asked.prompts)
        assert told in result.reason
        assert told not in go(request_for(run_dir, benchmark, asked.url)).reason
    assert len(read_lines(path)) == 16


def test_a_killed_run_goes_on_with_the_answers_it_has(run_dir: Path, benchmark: Path) -> None:
    path = run_dir / "evals" / "step_00000010" / "mt_bench.answers.jsonl"
    with judge_server(lambda *_: (200, {}, "[[5]]")) as asked:
        go(request_for(run_dir, benchmark, asked.url))
        whole = read_lines(path)
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:3]) + lines[3][:40])
        go(request_for(run_dir, benchmark, asked.url))
    found = {row["question_id"]: row["choices"] for row in read_lines(path)}
    assert found == {row["question_id"]: row["choices"] for row in whole}


def test_other_weights_answer_anew(run_dir: Path, benchmark: Path, tmp_path: Path, tokenizer) -> None:
    other = save_run(tmp_path / "chat2", tokenizer, seed=1)
    prefill(run_dir, benchmark)
    with judge_server(lambda *_: (200, {}, "[[5]]")) as asked:
        before = (run_dir / "evals" / "step_00000010" / "mt_bench.answers.jsonl").read_text()
        target = other / "evals" / "step_00000010"
        target.mkdir(parents=True)
        (target / "mt_bench.answers.jsonl").write_text(before)
        go(request_for(other, benchmark, asked.url))
    rows = read_lines(target / "mt_bench.answers.jsonl")
    assert len(rows) == 16
    assert len({row["model_id"] for row in rows}) == 2


def test_the_judge_sees_the_protocols_prompts(tmp_path: Path) -> None:
    benchmark = load_benchmark(write_benchmark(tmp_path / "mt_bench", official_prompts=True))
    assert benchmark.prompts_origin == "official"
    questions = [benchmark.questions[0], benchmark.questions[20]]
    answers = [Answer(question.question_id, ("one", "{two}"), truncated=False) for question in questions]
    found = {
        (r.question_id, r.turn): (r.prompt_name, r.system, r.user)
        for r in judge_requests(benchmark, questions, answers)
    }
    assert found == {
        (81, 1): ("single-v1", "sys", "ask 0?|one"),
        (81, 2): ("single-v1-multi-turn", "sys", "and 0?|one|{two}"),
        (101, 1): ("single-math-v1", "sys", "ask 20?|one|right 101 a"),
        (101, 2): ("single-math-v1-multi-turn", "sys", "{two}|right 101 b"),
    }


def test_our_own_prompts_show_question_answers_references_and_the_scale(benchmark: Path) -> None:
    loaded = load_benchmark(benchmark)
    questions = [loaded.questions[0], loaded.questions[20]]
    requests = judge_requests(
        loaded, questions, [Answer(q.question_id, ("uno", "due"), truncated=False) for q in questions]
    )
    for request in requests:
        whole = request.system + request.user
        assert "[[4]]" in whole
        assert "uno" in whole
        assert ("due" in whole) == (request.turn == 2)
        assert ("right 101 a" in whole) == (request.question_id == 101)


def test_the_thirteen_wrong_references_are_flagged(tmp_path: Path, run_dir: Path, monkeypatch) -> None:
    """Where the references are the published ones: here these are declared to be."""
    folder = write_benchmark(tmp_path / "mt_bench")
    published = load_benchmark(folder).sha256["reference_answer/gpt-4.jsonl"]
    monkeypatch.setitem(mt_data.SHA256, "reference_answer/gpt-4.jsonl", published)
    reply = lambda _, text: (200, {}, "[[1]]" if re.search(r"right 104 ", text) else "[[9]]")  # noqa: E731
    prefill(run_dir, tmp_path, limit=5)
    with judge_server(reply) as asked:
        result = go(request_for(run_dir, tmp_path, asked.url, limit=5))
    assert "known to be wrong (104, 105, 111, 113, 114, 122, 124, 125)" in result.reason
    assert result.metrics["average"].value < result.metrics["average_without_wrong_references"].value == 9
    samples = read_lines(run_dir / "evals" / "step_00000010" / result.samples)
    flagged = {sample["doc_id"] for sample in samples if sample["reference_known_wrong"]}
    assert flagged == set(WRONG_REFERENCES) & {sample["doc_id"] for sample in samples}
    assert len(WRONG_REFERENCES) == 13


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    hits, widths = 0, []
    for seed in range(60):
        ratings = random.normal(5, 2, (80, 1)) + random.normal(0, 0.5, (80, 2))
        low, high = bootstrap_metric(ratings, seed).ci95
        hits += low <= 5 <= high
        widths.append(high - low)
    assert hits >= 52
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt((4 + 0.125) / 80), rel=0.06), "turns are not independent"


def test_failures_are_left_out_of_means_and_an_unrated_turn_has_no_metric() -> None:
    ratings = np.array([[4.0, np.nan], [np.nan, np.nan], [8.0, 6.0]])
    assert bootstrap_metric(ratings).value == 6
    assert bootstrap_metric(np.full((3, 1), np.nan)) is None
    questions = [mt_data.Question(1, "writing", ("a", "b"), None)]
    found = score(questions, [Judgement(1, 1, "", 4.0), Judgement(1, 2, "", FAILED)], has_published_references=False)
    assert (set(found.metrics), found.failures) == ({"average", "turn_1"}, 1)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("question.jsonl", lambda rows: rows[:-1], "79 questions .*humanities 9.*a part of a benchmark"),
        ("question.jsonl", lambda rows: [*rows[:-1], {**rows[-1], "category": "sport"}], "expected 80, 10 of each"),
        ("question.jsonl", lambda rows: [{**rows[0], "turns": ["x"]}, *rows[1:]], "turns is not a list of two texts"),
        ("reference_answer/gpt-4.jsonl", lambda rows: rows[1:], r"no reference answer to question 101 \(reasoning\)"),
        ("judge_prompts.jsonl", lambda rows: rows[1:], "no prompt single-v1"),
        (
            "judge_prompts.jsonl",
            lambda rows: [{**rows[0], "prompt_template": "{questoin}"}, *rows[1:]],
            "template cannot be filled .*questoin",
        ),
    ],
)
def test_damaged_data_is_refused_by_name(tmp_path: Path, file: str, change, message: str) -> None:
    folder = write_benchmark(tmp_path / "mt_bench", official_prompts=True)
    write(folder / file, change(read_lines(folder / file)))
    with pytest.raises(EvalError, match=message):
        load_benchmark(tmp_path)
    assert describe(tmp_path).startswith("mt_bench: unavailable: ")


def prefers(wanted: str):
    """A judge that likes the answer of one model, whichever its place; of the questions on stem, the first place."""

    def reply(_, text):
        if re.search(r"(ask|and) 6\d\?", text):
            return 200, {}, "[[A]]"
        if re.search(r"(ask|and) 7\d\?", text):
            return 200, {}, "no verdict"
        answers = re.findall(r"\[Answer [AB]\]\n(.*?)\n", text + "\n", re.DOTALL)
        return 200, {}, "[[A]]" if answers[-2].strip() == wanted else "[[B]]"

    return reply


def test_two_checkpoints_are_compared_in_both_orders(run_dir: Path, benchmark: Path, tmp_path: Path, tokenizer) -> None:
    other = save_run(tmp_path / "other", tokenizer, seed=1)
    for run, text in ((run_dir, "mine"), (other, "theirs")):
        prefill(run, benchmark, text)
    with judge_server(prefers("mine")) as asked:
        one, two = (request_for(folder, benchmark, asked.url) for folder in (run_dir, other))
        result = run_pairwise(one, two, lambda *_: None)
        calls = len(asked.bodies)
        run_pairwise(one, two, lambda *_: None)
        assert len(asked.bodies) == calls == 32
        lost = run_pairwise(two, one, lambda *_: None)
    # Eight questions: six won, one (stem) judged by place and so a tie, one (humanities) without verdict.
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert values == pytest.approx({"points": 6.5 / 7, "wins": 6 / 7, "ties": 1 / 7, "losses": 0, "consistent": 6 / 7})
    assert lost.metrics["losses"].value == pytest.approx(6 / 7)
    assert "4 of 32 judgements have no verdict; their turns are left out" in result.reason
    samples = read_lines(run_dir / "evals" / "step_00000010" / "mt_bench_against.samples.jsonl")
    assert [sample["metrics"] for sample in samples if sample["category"] == "humanities"] == [{}, {}]
    with pytest.raises(EvalError, match="the same weights as"):
        run_pairwise(one, one, lambda *_: None)


def test_conversations_are_written_as_the_result_says() -> None:
    talk = [("hi", " hello \n"), ("bye", None)]
    assert TEMPLATES["plain"].prompt(talk) == "User: hi\n\nAssistant: hello\n\nUser: bye\n\nAssistant:"
    assert (
        TEMPLATES["alpaca"]
        .prompt(talk)
        .endswith("### Instruction:\nhi\n\n### Response:\nhello\n\n### Instruction:\nbye\n\n### Response:\n")
    )


def test_the_command_shows_scores_categories_and_what_to_know(run_dir: Path, benchmark: Path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    words = ["eval", "mt-bench", "--checkpoint", run_dir, "--data", benchmark, "--limit", "1", "--judge-model", "m"]
    prefill(run_dir, benchmark)
    with judge_server(lambda *_: (200, {}, "[[3]]")) as asked:
        found = CliRunner().invoke(main, [*map(str, words), "--judge", asked.url, "--judge-key-env", "MY_KEY"])
    assert found.exit_code == 0, found.output
    assert asked.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "3.0000" in found.output
    assert "coding: average 3.00, turn_1 3.00, turn_2 3.00" in found.output
    everything = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert b"sk-secret" not in everything
    assert "sk-secret" not in found.output
    refused = CliRunner().invoke(main, [*map(str, words), "--judge", "http://x/v1", "--judge-key-env", "NOT_SET"])
    assert (refused.exit_code, refused.output) == (
        2,
        "error: --judge-key-env NOT_SET: there is no such environment variable, or it is empty\n",
    )


@pytest.mark.skipif(not (SHARED / "mt_bench").is_dir(), reason=f"{SHARED}/mt_bench is not here")
def test_the_real_files_are_known_and_their_prompts_can_be_filled() -> None:
    loaded = load_benchmark(SHARED)
    assert loaded.sha256 == mt_data.SHA256
    assert (len(loaded.questions), loaded.prompts_origin, loaded.has_published_references) == (80, "official", True)
    assert sum(question.references is not None for question in loaded.questions) == 30
    requests = judge_requests(
        loaded, loaded.questions, [Answer(q.question_id, ("A!", "B!"), truncated=False) for q in loaded.questions]
    )
    assert len(requests) == 160
    assert all("A!" in request.user for request in requests)
    assert "13 of 30 references are known to be wrong" in describe(SHARED)
