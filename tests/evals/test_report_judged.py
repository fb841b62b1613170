"""What the report says of answers that a judge gave points: from real results to page, markdown and JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evals.judge.choose import JudgeOptions
from evals.judged_answers import AnswersRequest, run_answers
from evals.judged_model import ModelRequest
from evals.lines import read_lines
from evals.mt_bench import data as mt_data
from evals.mt_bench.data import WRONG_REFERENCES, load_benchmark
from evals.mt_bench.pairwise import run_pairwise
from evals.mt_bench.run import run_mt_bench
from evals.mt_bench.setting import MTBenchRequest
from evals.report import build_view, write_run_report
from evals.report_inputs import read_run_folder
from megagpt.checkpoint.open import open_checkpoint
from megagpt.config.load import dump_config
from tests.evals.conftest import SHARED, save_run
from tests.evals.judge_server import judge_server
from tests.evals.test_mt_bench import ORDER, prefers, prefill, write_benchmark
from tests.evals.test_report import HOSTILE, read_page, squeeze

LIMIT = 5
N_ROWS = 12


@dataclass(frozen=True)
class Written:
    """A run whose answers were judged, and its report."""

    run_dir: Path
    page: str
    charts: str
    html: str
    markdown: str
    content: dict[str, Any]

    def judged(self, task: str) -> dict[str, Any]:
        return next(found for found in self.content["judged"] if found["task"] == task)


def rate(_: int, text: str) -> tuple[int, dict[str, str], str]:
    """A rating that follows the category; one question gets none, and those with a wrong reference get the least."""
    number = int(re.findall(r"ask (\d+)\?", text)[0])
    if number == 70:
        return 200, {}, f"I would rather not. {HOSTILE}"
    if number + 81 in WRONG_REFERENCES:
        return 200, {}, "[[1]]"
    return 200, {}, f"Rating: [[{3 + number // 10 - ('[Second question]' in text)}]]"


def grade(_: int, text: str) -> tuple[int, dict[str, str], str]:
    number = int(re.findall(r"right (\d+)", text)[0])
    return 200, {}, "no number" if number == 3 else str(5 * number)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Written:
    folder = tmp_path_factory.mktemp("judged")
    run_dir, other = save_run(folder / "chat", tokenizer), save_run(folder / "other", tokenizer, seed=1)
    (run_dir / "config.yaml").write_text(dump_config(open_checkpoint(run_dir).config))
    benchmark = write_benchmark(folder / "data" / "mt_bench")
    published = load_benchmark(benchmark).sha256["reference_answer/gpt-4.jsonl"]
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"right {n}"} for n in range(N_ROWS)]
    (folder / "held_out.json").write_text(json.dumps(rows))
    prefill(run_dir, folder / "data", "mine", limit=LIMIT)
    prefill(other, folder / "data", "theirs", limit=LIMIT)

    def request(run: Path, spec: str) -> MTBenchRequest:
        return MTBenchRequest(ModelRequest(run), folder / "data", JudgeOptions(spec, model="judge-7b"), limit=LIMIT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mt_data.SHA256, "reference_answer/gpt-4.jsonl", published)  # declared to be the published ones
        with judge_server(rate) as asked:
            run_mt_bench(request(run_dir, asked.url), lambda *_: None)
        with judge_server(prefers("mine")) as asked:
            run_pairwise(request(run_dir, asked.url), request(other, asked.url), lambda *_: None)
        with judge_server(grade) as asked:
            judge = JudgeOptions(asked.url, model="judge-7b")
            model = ModelRequest(run_dir, template="alpaca")
            run_answers(AnswersRequest(model, folder / "held_out.json", judge, max_new_tokens=4), lambda *_: None)
    html, markdown, content = write_run_report(run_dir)
    page = read_page(html)
    return Written(
        run_dir,
        squeeze(page.text),
        squeeze(page.chart_text),
        html.read_text(),
        markdown.read_text(),
        json.loads(content.read_text()),
    )


def test_mt_bench_is_shown_by_turn_and_category_with_bootstrap_intervals(written: Written) -> None:
    found = written.judged("mt_bench")
    assert set(found["metrics"]) == {"average", "turn_1", "turn_2", "average_without_wrong_references"}
    assert found["metrics"]["turn_1"]["value"] > found["metrics"]["turn_2"]["value"]
    assert [category["name"] for category in found["categories"]] == list(ORDER)
    low, high = found["metrics"]["average"]["ci95"]
    shown = f"average of both turns {found['metrics']['average']['value']:.2f} {low:.2f} to {high:.2f}"
    assert shown in written.page
    assert "writing 5 2.50 2.50 to 2.50 3.00 3.00 to 3.00 2.00 2.00 to 2.00" in written.page
    math = next(category for category in found["categories"] if category["name"] == "math")
    assert f"{math['metrics']['average']['value']:.2f}" in written.page
    for text in ("MT-Bench by category", "roleplay", "all points given"):
        assert text in written.charts


def test_failed_judgements_are_counted_and_shown(written: Written) -> None:
    found = written.judged("mt_bench")
    assert (found["n_judgements"], found["n_failed"]) == (80, 2)
    assert "Without points: 2 of 80 judgements; left out of every mean." in written.page
    assert "I would rather not." in written.page
    assert "<script" not in written.html


def test_wrong_references_are_named_as_such(written: Written) -> None:
    flagged = sorted(set(WRONG_REFERENCES) & {row["doc_id"] for row in samples(written, "mt_bench")})
    assert written.judged("mt_bench")["wrong_references"] == flagged
    assert len(flagged) == 8  # of 13: only five questions of each category were asked
    names = ", ".join(map(str, flagged))
    for text in (written.page, squeeze(written.markdown)):
        assert f"reference answers to 8 of these questions are known to be wrong: {names}." in text
    assert "its reference is known to be wrong" in written.page  # the worst answers are among them


def test_the_judge_is_named_and_whether_it_was_asked(written: Written, tmp_path: Path) -> None:
    for text in (written.page, squeeze(written.markdown)):
        assert "judged by judge-7b (a model behind an OpenAI-compatible server, at temperature 0)" in text
        assert "megagpt's own prompts: not comparable with published scores" in text
        assert re.search(r"the judge's server:? http://127\.0\.0\.1:\d+/v1", text)
    replayed = tmp_path / "judgements.jsonl"
    replayed.write_text((written.run_dir / "evals" / "step_00000010" / "mt_bench.judgements.jsonl").read_text())
    benchmark = write_benchmark(tmp_path / "data" / "mt_bench").parent
    judge = JudgeOptions(f"replay:{replayed}")
    run_mt_bench(MTBenchRequest(ModelRequest(written.run_dir), benchmark, judge, limit=LIMIT), lambda *_: None)
    (found,) = [one for one in build_view(read_run_folder(written.run_dir))["judged"] if one.task == "mt_bench"]
    assert found.judge == "replayed: judge-7b"
    assert "read from a file" in found.how
    assert found.wrong_references == ()  # these references are not the published ones
    assert "whether they are right is not known" in found.notes


def test_two_checkpoints_side_by_side_name_the_other_one(written: Written) -> None:
    found = written.judged("mt_bench_against")
    assert "other at step 10, weights" in found["against"]
    assert (found["n_judgements"], found["n_failed"]) == (80, 10)
    assert "Without points: 10 of 80 turns, each judged in both places; left out of every mean." in written.page
    wins = found["metrics"]["wins"]
    assert f"wins {wins['value']:.4f} {wins['ci95'][0]:.4f} to {wins['ci95'][1]:.4f}" in written.page


def test_scores_from_0_to_100_have_a_mean_a_histogram_and_examples(written: Written) -> None:
    found = written.judged("answers_held_out")
    values = [5 * n for n in range(N_ROWS) if n != 3]
    assert sorted(found["points"]) == values
    metric = found["metrics"]["score"]
    assert metric["value"] == pytest.approx(sum(values) / len(values))
    assert (
        f"mean of all answers {metric['value']:.1f} {metric['ci95'][0]:.1f} to {metric['ci95'][1]:.1f}" in written.page
    )
    assert "Without points: 1 of 12 judgements" in written.page
    assert "Answers to held_out, all points given" in written.charts
    assert [one["points"] for one in found["best"]] == [55, 50]
    assert [one["points"] for one in found["worst"]] == [0, 5]
    assert found["best"][0]["right"] == "right 11"
    assert "Right would have been: right 11" in written.page


def test_judged_points_are_no_scores_of_tasks_and_no_subjects(written: Written) -> None:
    assert written.content["scores"] == []
    assert written.content["subjects"] == []
    for number in set(re.findall(r"\d+(?:[.,]\d+)*", written.page)):
        assert number in written.markdown, number


def samples(written: Written, task: str) -> list[dict[str, Any]]:
    return read_lines(written.run_dir / "evals" / "step_00000010" / f"{task}.samples.jsonl")


@pytest.mark.exhaustive
@pytest.mark.skipif(not (SHARED / "mt_bench").is_dir(), reason=f"{SHARED}/mt_bench is not here")
def test_with_the_published_files_all_thirteen_wrong_references_are_named(tmp_path: Path, tokenizer) -> None:
    run_dir = save_run(tmp_path / "chat", tokenizer)
    (run_dir / "config.yaml").write_text(dump_config(open_checkpoint(run_dir).config))
    prefill(run_dir, SHARED, "an answer", limit=10)
    with judge_server(lambda *_: (200, {}, "[[6]]")) as asked:
        judge = JudgeOptions(asked.url, model="judge-7b")
        run_mt_bench(MTBenchRequest(ModelRequest(run_dir), SHARED, judge), lambda *_: None)
    html, markdown, _ = write_run_report(run_dir)
    names = ", ".join(map(str, WRONG_REFERENCES))
    for text in (squeeze(read_page(html).text), squeeze(markdown.read_text())):
        assert f"reference answers to 13 of these questions are known to be wrong: {names}." in text
        assert "Without points: 0 of 160 judgements." in text
        assert "megagpt's own prompts" not in text
