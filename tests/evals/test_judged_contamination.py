"""MT-Bench's questions in the training tokens: found, and the rating shown with and without them."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from evals.contamination import ContaminationRequest, find_contamination
from evals.contamination_file import Contamination, TaskContamination, read_contamination
from evals.items import collect_items
from evals.judge.choose import JudgeOptions
from evals.judged_model import ModelRequest
from evals.lines import read_lines
from evals.mt_bench.data import load_benchmark
from evals.mt_bench.run import run_mt_bench
from evals.mt_bench.setting import MTBenchRequest
from evals.report import build_view, write_run_report
from evals.report_checks import NotSplit
from evals.report_inputs import read_run_folder
from evals.report_judged_split import split_judged
from evals.results import Metric
from evals.task_loader import plan_task
from megagpt.checkpoint.open import open_checkpoint
from megagpt.config.load import dump_config
from megagpt.errors import EvalError
from tests.evals.conftest import SHARED, save_run
from tests.evals.judge_server import judge_server
from tests.evals.result_files import make_result
from tests.evals.test_contamination import FILLER, SUITES, write_tokens
from tests.evals.test_mt_bench import prefill, write, write_benchmark
from tests.evals.test_report import read_page, squeeze

QUIET = Console(file=io.StringIO())
DIRTY = (81, 101)
"""The second turn of a question on writing, and the reference answer to one on reasoning."""


def sentence(kind: str, number: int) -> str:
    """16 words that no other has."""
    return " ".join(f"{kind}{number}x{word}" for word in range(16))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 questions long enough to be told from ordinary language."""
    folder = write_benchmark(tmp_path_factory.mktemp("data") / "mt_bench")
    rows = read_lines(folder / "question.jsonl")
    for row in rows:
        number = row["question_id"]
        row["turns"] = [f"{sentence('ask', number)}?", f"{sentence('more', number)}?"]
    write(folder / "question.jsonl", rows)
    references = folder / "reference_answer" / "gpt-4.jsonl"
    known = read_lines(references)
    for row in known:
        row["choices"][0]["turns"][1] = sentence("right", row["question_id"])
    write(references, known)
    return folder.parent


def look(data: Path, tokens: Path, out: Path) -> Path:
    request = ContaminationRequest(("mt_bench",), data_dir=data, tokens=(tokens,), out=out, suites_dir=SUITES)
    return find_contamination(request, QUIET)


def test_turns_and_reference_answers_are_the_texts_of_80_documents(data: Path, tmp_path: Path) -> None:
    found = collect_items(("mt_bench",), data, SUITES)
    assert found.leaves == {"mt_bench": ["mt_bench"]}
    assert found.data == {"mt_bench": load_benchmark(data).digest()}
    texts = {row["id"]: row["texts"] for row in found.items}
    assert sorted(texts) == list(range(81, 161))
    assert texts[81] == [f"{sentence('ask', 81)}?", f"{sentence('more', 81)}?"]
    assert texts[101][1] == f"{sentence('more', 101)}? {sentence('right', 101)}"
    with pytest.raises(EvalError, match=r"mt_bench: its questions are read from local files alone; .*--data"):
        collect_items(("mt_bench",), None, SUITES)
    with pytest.raises(EvalError, match=r"mt_bench: .*nowhere: neither mt_bench/question\.jsonl"):
        collect_items(("mt_bench",), data / "nowhere", SUITES)
    with pytest.raises(EvalError, match="a judge rates its answers, `megagpt eval mt-bench`"):
        plan_task("mt_bench", data, tmp_path)  # what `eval run` asks


def test_the_report_shows_ratings_of_clean_and_dirty_questions(tmp_path: Path, data: Path, tokenizer) -> None:
    run_dir = save_run(tmp_path / "chat", tokenizer)
    (run_dir / "config.yaml").write_text(dump_config(open_checkpoint(run_dir).config))
    prefill(run_dir, data, limit=2)

    def rate(_, text):
        return 200, {}, "[[9]]" if any(f"ask{number}x" in text for number in DIRTY) else "[[3]]"

    with judge_server(rate) as asked:
        judge = JudgeOptions(asked.url, model="judge-7b")
        result = run_mt_bench(MTBenchRequest(ModelRequest(run_dir), data, judge, limit=2), lambda *_: None)
    documents = [FILLER, f"{FILLER} {sentence('more', 81)} {FILLER}", sentence("right", 101).upper()]
    tokens = write_tokens(tmp_path / "tokens" / "train", tokenizer, documents)
    path = look(data, tokens, run_dir / "evals" / "contamination.json")
    assert read_contamination(path).tasks["mt_bench"].dirty == {"81", "101"}

    view = build_view(read_run_folder(run_dir))
    (split,) = view["contamination"]["splits"]
    assert (split.task, split.metric) == ("mt_bench", "average")
    assert (split.full.n, split.clean.n, split.dirty.n) == (16, 14, 2)
    assert split.full.score == result.metrics["average"], "the rating that the result has, interval and all"
    assert (split.clean.score.value, split.dirty.score.value) == (3, 9)
    low, high = split.full.score.ci95
    assert low < split.full.score.value == 3.75 < high
    html, markdown, _ = write_run_report(run_dir)
    for text in (squeeze(read_page(html).text), squeeze(markdown.read_text().replace("|", " "))):
        found = re.search(r"mt_bench average 3\.7500 (\d\.\d{4}) to (\d\.\d{4}) 16 3\.0000 .* 14 9\.0000 .* 2 ", text)
        assert found is not None, text
        assert (float(found[1]), float(found[2])) == pytest.approx((low, high), abs=1e-4)


def contamination(**data: str) -> Contamination:
    table = TaskContamination(frozenset({"81"}), frozenset({"82", "83"}), frozenset(), 0)
    return Contamination({"mt_bench": table}, data, {"mt_bench": ["mt_bench"]}, "tokens", None)


def rating(question: int, turn: int, value: float | None) -> dict:
    return {"doc_id": question, "turn": turn, "metrics": {} if value is None else {"rating": value}}


def test_what_cannot_be_split_says_why_and_missing_ratings_stay_out_of_the_means() -> None:
    rows = [rating(81, 1, 8), rating(81, 2, None), rating(82, 1, 2), rating(82, 2, 4), rating(83, 1, 3)]
    known = {"average": Metric(4.25)}
    result = make_result("mt_bench", known, data={"sha256": "abc"}, settings={"judge": "j"})
    split = split_judged(1, result, rows, contamination(mt_bench="abc"))
    assert (split.dirty.score.value, split.dirty.score.ci95) == (8, None), "one question has no interval"
    assert (split.clean.score.value, split.clean.n) == (3, 2)
    for reason, found in {
        "not looked for; `megagpt eval contamination --tasks mt_bench` does": split_judged(
            1, result, rows, contamination()
        ),
        "other files were looked for: data xyz, judged on abc": split_judged(
            1, result, rows, contamination(mt_bench="xyz")
        ),
        "the single judgements were not kept": split_judged(1, result, [], contamination(mt_bench="abc")),
        "its questions are a file of the user's own": split_judged(
            1, make_result("answers_mine", {}, settings={"judge": "j"}), rows, contamination(mt_bench="abc")
        ),
    }.items():
        assert isinstance(found, NotSplit)
        assert reason in found.reason


@pytest.mark.skipif(not (SHARED / "mt_bench").is_dir(), reason=f"{SHARED}/mt_bench is not here")
def test_a_published_question_is_found_in_tokens(tmp_path: Path, tokenizer) -> None:
    question = load_benchmark(SHARED).questions[0]
    tokens = write_tokens(tmp_path / "tokens" / "train", tokenizer, [FILLER, question.turns[0]])
    path = look(SHARED, tokens, tmp_path / "contamination.json")
    table = json.loads(path.read_text())["tasks"]["mt_bench"]
    assert (table["dirty"], table["items"]) == ([question.question_id], 80)
    assert len(table["clean"]) >= 75
