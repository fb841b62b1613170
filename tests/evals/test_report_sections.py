"""What the report says beyond the scores: published models, paired tests, contamination, subjects, answers, cost."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.report import build_view, write_run_report
from evals.report_charts import heat_color
from evals.report_cost import process_hours
from evals.report_examples import examples
from evals.report_inputs import read_run_folder
from evals.report_scores import prompts_hash
from evals.results import Metric
from evals.stats import clustered_stderr, wilson_interval
from megagpt.config.load import dump_config
from megagpt.config.schema import TrainingRun
from tests.evals.result_files import make_result, sample, write_answers
from tests.evals.test_report import HOSTILE, Page, make_config, read_page, squeeze, write_json, write_rows

STEPS = (1000, 2000)
TOKENS_A_STEP = 524_288
LEAVES = [f"mmlu_subject_{i:02d}" for i in range(24) for _ in range(10)]
DIRTY = list(range(0, 100, 10))


def arc_answers(step):
    """100 documents: at the later step 30 more are right, none is lost; the dirty ones are right at both."""
    right = [1.0 if i in DIRTY or i % 10 < (2 if step == 1000 else 5) else 0.0 for i in range(100)]
    return [{"acc": value, "acc_norm": float(i % 2)} for i, value in enumerate(right)]


def mmlu_answers():
    return [{"acc": float(int(leaf[-2:]) % 4 == 0 or i % 10 == 0)} for i, leaf in enumerate(LEAVES)]


def gsm8k_rows():
    common = {"choices": None, "logprobs": None, "correct": False}
    return [
        sample(
            "gsm8k", i, {"exact_match": 0.0}, **common, filter=name, raw_response=f"{HOSTILE} {i}", target=f"#### {i}"
        )
        for i in range(3)
        for name in ("strict-match", "flexible-extract")
    ]


def write_step(run_dir: Path, step: int) -> None:
    folder = run_dir / "evals" / f"step_{step:08d}"
    write_answers(folder, "arc_easy", arc_answers(step), step=step, seconds=60.0)
    write_answers(folder, "mmlu", mmlu_answers(), leaves=LEAVES, step=step, n_shots=5, truncated=7, seconds=60.0)
    metrics = {f"exact_match,{name}": Metric(0.0, 0.0, (0.0, 0.56)) for name in ("strict-match", "flexible-extract")}
    make_result("gsm8k", metrics, step=step, n=3, n_total=1319, n_shots=5).write(folder, gsm8k_rows())


def contamination() -> dict[str, Any]:
    clean = [i for i in range(100) if i not in (*DIRTY, 99)]
    arc = {"items": 100, "dirty": DIRTY, "clean": clean, "not_matchable": [99], "common": 2, "listed": []}
    return {
        "format": 1,
        "ngram": 13,
        "scanned": [{"prefix": "tokens_train", "tokens": 1_048_576_000, "documents": 9}],
        "listed": None,
        "data": {"arc_easy": "sha-arc_easy", "mmlu": "sha-of-other-rows"},
        "leaves": {"arc_easy": ["arc_easy"]},
        "tasks": {"arc_easy": arc},
        "found": [],
    }


@dataclass(frozen=True)
class Written:
    run_dir: Path
    view: dict[str, Any]
    html: str
    page: Page
    markdown: str
    content: dict[str, Any]


def write_run(tmp_path: Path) -> Path:
    """A GPT-2 of 124 million parameters after 1,000 and 2,000 steps of half a million tokens."""
    run_dir = tmp_path / "gpt2"
    run_dir.mkdir()
    config = json.loads(make_config(run_dir, tmp_path / "data").model_dump_json())
    config["model"] |= {"n_layer": 12, "n_head": 12, "d_model": 768}
    (run_dir / "config.yaml").write_text(dump_config(TrainingRun.model_validate_json(json.dumps(config))))
    write_json(run_dir / "versions.json", {"torch": "2.13.0+cu128", "python": "3.11.9"})
    write_json(run_dir / "plan.json", {"parameters": 124_439_808, "world_size": 8})
    rows = [
        {"step": step, "loss": 4.0, "tokens": step * TOKENS_A_STEP, "step_seconds": 90.0} for step in (500, 1000, 2000)
    ]
    write_rows(run_dir / "metrics.jsonl", [*rows, {"step": 2000, "val_loss": 3.5, "val_seconds": 30.0}])
    events = [("started", 0, 8), ("resumed", 1000, 4), ("finished", 2000, None)]
    write_rows(
        run_dir / "events.jsonl",
        [
            {"time": "2026-01-01T00:00:00Z", "event": event, "step": step} | ({"world_size": size} if size else {})
            for event, step, size in events
        ],
    )
    for step in STEPS:
        write_step(run_dir, step)
    last = run_dir / "evals" / "step_00002000"
    points = {"average": Metric(3.25, 0.1, (3.05, 3.45)), "turn_2": Metric(2.5, 0.1, (2.3, 2.7))}
    settings = {"judge": "judge-7b", "limit": None}
    make_result("mt_bench", points, step=2000, n=80, n_total=80, settings=settings).write(last)
    make_result("humaneval", {"pass@1": Metric(0.0123, 0.01, (0.002, 0.04))}, step=2000, n=164, n_total=164).write(last)
    write_json(run_dir / "evals" / "contamination.json", contamination())
    return run_dir


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    run_dir = write_run(tmp_path_factory.mktemp("sections"))
    html, markdown, content = write_run_report(run_dir)
    return Written(
        run_dir,
        build_view(read_run_folder(run_dir)),
        html.read_text(),
        read_page(html),
        markdown.read_text(),
        json.loads(content.read_text()),
    )


def score_of(view, task, metric):
    return next(score for score in view["scores"] if (score.task, score.metric) == (task, metric))


def test_the_page_is_one_file_that_loads_nothing_and_markdown_has_its_numbers(written):
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in written.page.tags}
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", written.html)
    ids = re.findall(r'\bid="([^"]+)"', written.html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)', written.html)) <= set(ids)
    for number in set(re.findall(r"\d+(?:[.,]\d+)*", written.page.text)):
        assert number in written.markdown, number


def test_charts_take_the_pages_colours_so_that_they_can_be_read_in_the_dark(written):
    assert "prefers-color-scheme: dark" in written.html
    assert "@media print" in written.html
    charts = "".join(re.findall(r"<svg.*?</svg>", written.html, re.DOTALL))
    assert "currentColor" in charts
    assert "var(--grid)" in charts
    assert not re.search(r"fill: ?#(000000|ffffff)", charts)


# ---- scores


def test_mmlus_interval_is_clustered_by_subject_and_others_are_wilsons(written):
    mmlu = score_of(written.view, "mmlu", "acc")
    values = [row["acc"] for row in mmlu_answers()]
    expected = clustered_stderr(values, LEAVES)
    assert mmlu.stderr == pytest.approx(expected)
    assert mmlu.ci95 == pytest.approx((mmlu.value - 1.96 * expected, mmlu.value + 1.96 * expected), abs=1e-4)
    assert mmlu.method == "clustered by 24 tasks"
    wilson = wilson_interval(sum(values), len(values))
    assert mmlu.ci95[1] - mmlu.ci95[0] > 1.5 * (wilson[1] - wilson[0])  # subjects differ: 24 units, not 240
    arc = score_of(written.view, "arc_easy", "acc")
    assert (arc.method, arc.ci95) == ("Wilson", pytest.approx(wilson_interval(50, 100)))


def test_the_prompt_hash_follows_the_prompts_and_not_their_order(written):
    rows = [sample("t", i, {"acc": 1.0}) for i in range(3)]
    assert prompts_hash(rows) == prompts_hash(rows[::-1])
    assert prompts_hash(rows) != prompts_hash([*rows[:2], sample("t", 2, {}, prompt_hash="other")])
    assert prompts_hash([]) == ""
    assert score_of(written.view, "arc_easy", "acc").prompts in written.page.text
    assert "not kept" in written.page.text  # humaneval's


def test_judged_points_stand_apart_with_their_judge(written):
    assert [(found.task, found.judge) for found in written.view["judged"]] == [("mt_bench", "judge-7b")]
    assert not any(score.task == "mt_bench" for score in written.view["scores"])
    assert "average of both turns 3.25 3.05 to 3.45" in squeeze(written.page.text)
    assert "humaneval pass@1 0.0123" in squeeze(written.page.text)
    assert "mt_bench" not in written.page.chart_text
    assert not any(group.group == "mt_bench" for group in written.view["subjects"])


def test_judged_answers_of_a_later_step_leave_the_scores_where_they_are(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_answers(run_dir / "evals" / "step_00000010", "arc_easy", arc_answers(1000), step=10)
    judged = make_result("mt_bench", {"average": Metric(3.25, 0.1, (3.05, 3.45))}, step=20, settings={"judge": "j"})
    for step in (20, 30):
        (run_dir / "evals" / f"step_{step:08d}").mkdir()
        judged.write(run_dir / "evals" / f"step_{step:08d}")
    (run_dir / "config.yaml").write_text(dump_config(make_config(run_dir, tmp_path / "data")))
    view = build_view(read_run_folder(run_dir))
    assert {score.step for score in view["scores"]} == {10}
    assert view["earlier_scores"] == []
    assert view["examples"]
    assert [found.step for found in view["judged"]] == [30]
    assert [found.step for found in view["judged_before"]] == [20]


def test_scores_of_several_steps_are_drawn_with_chance(written):
    for text in ("arc_easy by step", "mmlu by step", "Scores at step 2,000", "chance"):
        assert text in written.page.chart_text


# ---- published models


def test_equal_models_stand_beside_the_score_with_the_rule_and_the_source(written):
    text = squeeze(written.page.text)
    assert "Equal parameters: within a factor of 1.5" in text
    assert re.search(r"equal parameters OPT-125M 125 M 300 G 2\.2e\+20 0\.4352 0\.0102 opt_by_pythia", text)
    assert "Pythia-160M at step" in text  # 7.8e17 FLOPs: a checkpoint from the middle of its training
    assert "EleutherAI/pythia@a19eecb8 evals/opt" in text
    assert "arc_easy acc, 0-shot" in written.page.chart_text
    assert "this run" in written.page.chart_text
    assert "arc_easy acc, 0-shot, over training" in written.page.chart_text


def test_what_is_not_comparable_is_counted_with_the_reason_and_never_in_a_table(written):
    text = squeeze(written.page.text)
    assert re.search(r"mmlu acc defined otherwise: hendrycks_test \d+", text)
    (mmlu,) = [one for one in written.content["published"] if one["score"]["task"] == "mmlu"]
    assert mmlu["neighbours"]["comparable"] == []
    assert "mmlu acc, 5-shot" not in written.page.chart_text
    assert (
        "GPT-2 124M 124 M acc_norm 0 0.2721 defined otherwise: completion llmc_mmlu" in text
    )  # named, with the reason
    assert not any(
        one["score"]["task"] == "gsm8k" and one["neighbours"]["comparable"] for one in written.content["published"]
    )


# ---- paired tests


def test_checkpoints_are_compared_by_their_answers(written):
    rows = {(row.task, row.metric): row for row in written.view["comparison"].differences}
    arc = rows["arc_easy", "acc"]
    assert (arc.a, arc.b, arc.only_a, arc.only_b) == ("step 1,000", "step 2,000", 0, 30)
    assert arc.verdict == "step 2,000 is better"
    assert rows["arc_easy", "acc_norm"].verdict == "no difference shown"
    assert "step 2,000 (B) against step 1,000 (A)" in squeeze(written.page.text)
    assert "**step 2,000 is better**" in written.markdown
    shown = re.findall(r'<td class="tight shown">([^<]*)<', written.html)
    assert shown == ["B is better"]
    assert written.content["comparison"]["differences"][0]["verdict"] == "step 2,000 is better"


# ---- contamination


def test_scores_are_split_into_clean_and_dirty_documents(written):
    (acc, _) = written.view["contamination"]["splits"]
    assert (acc.task, acc.metric, acc.full.n, acc.clean.n, acc.dirty.n) == ("arc_easy", "acc", 100, 89, 10)
    assert acc.dirty.score.value == 1.0
    assert acc.clean.score.value == pytest.approx(40 / 89)
    assert acc.clean.score.ci95 == pytest.approx(wilson_interval(40, 89))
    assert (acc.n_not_matchable, acc.n_common) == (1, 2)
    assert "10.1 %" in written.page.text  # 10 of 99 that can be told
    assert f"{40 / 89:.4f}" in written.markdown


def test_answers_to_other_rows_are_not_split_and_what_was_not_looked_for_says_so(written):
    text = squeeze(written.page.text)
    assert "mmlu: other rows were looked for: data sha-of-other-rows, scored on sha-mmlu" in text
    assert "gsm8k: not looked for; `megagpt eval contamination --tasks gsm8k` does" in text


# ---- subjects, answers, cost


def test_the_heat_map_has_every_subject_at_every_step(written):
    (group,) = written.view["subjects"]
    assert (group.group, group.steps, len(group.rows)) == ("mmlu", STEPS, 24)
    best, worst = group.rows[0], group.rows[-1]
    assert (best[2][-1], worst[2][-1]) == (1.0, 0.1)
    cells = re.findall(r'style="background: (rgb\([^)]*\))">([\d.]+)<', written.html)
    assert len(cells) == 48
    assert {color for color, value in cells if value == "1.0000"} == {"rgb(0 114 178 / 0.75)"}
    assert {color for color, value in cells if value == "0.1000"} == {"rgb(213 94 0 / 0.20)"}
    assert heat_color(None, 0.25) == "transparent"


def test_the_surest_right_and_wrong_answers_are_shown_with_their_choices():
    rows = [
        sample("t", i, {"acc": float(right)}, logprobs=list(logprobs), response=int(logprobs[1] > logprobs[0]))
        for i, (right, logprobs) in enumerate(
            [(1, (-5, -1)), (1, (-2, -1)), (0, (-1, -9)), (0, (-1, -2)), (1, (-9, -1))]
        )
    ]
    found = examples(7, "t", rows)
    assert [(e.document, e.is_right, e.margin) for e in found] == [
        ("4", True, 8.0),
        ("0", True, 4.0),
        ("2", False, -8.0),
        ("3", False, -1.0),
    ]
    assert [(c.text, c.is_chosen, c.is_right) for c in found[2].choices] == [
        (" wrong", True, False),
        (" right", False, True),
    ]


def test_a_prompt_of_which_the_end_alone_is_kept_begins_with_a_word() -> None:
    kept = "rd of a long prompt. " + 20 * "And more words. "
    (whole, cut) = (sample("t", i, {"acc": 1.0}, prompt_end=text) for i, text in enumerate(("Short?", kept[:300])))
    shown = {e.document: e.prompt_end for e in examples(7, "t", [whole, cut])}
    assert shown["0"] == "Short?"
    assert shown["1"].startswith("[...] of a long prompt. And")


def test_generated_answers_are_shown_once_a_document_and_cannot_act(written):
    found = [e for e in written.view["examples"] if e.task == "gsm8k"]
    assert [e.document for e in found] == ["0", "1"]  # the first ones, as the page says
    assert "<script" not in written.html
    assert HOSTILE in written.page.text
    assert "Right would have been: #### 0" in squeeze(written.page.text)


def test_cost_counts_the_processes_that_each_step_had(written):
    run = read_run_folder(written.run_dir)
    assert process_hours(run) == ("device-hours", pytest.approx((90 * 8 + 90 * 8 + 90 * 4) / 3600))
    text = squeeze(written.page.text)
    assert "device-hours 0.50" in text
    assert "8.4 a parameter" in text  # 1.05e9 tokens / 124e6
    assert "evaluation 4 min 00 s 930 documents in 8 results" in text


def test_the_json_has_the_numbers_as_they_are(written):
    content = written.content
    arc = next(s for s in content["scores"] if s["task"] == "arc_easy" and s["metric"] == "acc")
    assert arc["value"] == 0.5
    assert arc["ci95"] == list(score_of(written.view, "arc_easy", "acc").ci95)
    assert content["plan"]["parameters"] == 124_439_808
    assert content["contamination"]["splits"][0]["dirty"]["n"] == 10
    assert all(np.isfinite(s["value"]) for s in content["scores"])


def test_a_run_that_nobody_looked_into_says_so(tmp_path):
    run_dir = tmp_path / "run"
    write_answers(run_dir / "evals" / "step_00000010", "arc_easy", arc_answers(1000), step=10)
    (run_dir / "config.yaml").write_text(dump_config(make_config(run_dir, tmp_path / "data")))
    html, markdown, _ = write_run_report(run_dir)
    for text in (squeeze(read_page(html).text), squeeze(markdown.read_text())):
        assert "nobody has looked for the benchmarks' documents" in text
        assert "A test needs two checkpoints with scores." in text
        assert "megagpt eval contamination --checkpoint" in text
