"""Curves over training steps in the report: from the files that evaluation during training writes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals.gold import GoldScores
from evals.live import described
from evals.live_files import LiveEvaluation, LiveTask
from evals.report import build_view, write_run_report
from evals.report_inputs import read_run_folder
from evals.report_steps import collect, right_answer_charts, step_charts
from evals.results import Metric, make_metric
from evals.scoring import Scores
from evals.stats import clustered_stderr
from megagpt.config.load import dump_config
from megagpt.errors import EvalError
from tests.evals.result_files import sample, write_answers
from tests.evals.test_report import make_config, read_page, squeeze, write_rows

STEPS = (0, 200, 400)


def live(step: int, *, n: int = 100, diverged: bool = False) -> LiveEvaluation:
    right = 25 + step // 20
    acc = make_metric(right / 100, 0.04, 100, is_proportion=True, higher_is_better=True)
    bits = float("nan") if diverged else 2.5 - step / 1000
    gold = GoldScores(n - 5, bits, step / 100 - 1, 0.05, None if step == 0 else 0.2)
    arc = LiveTask("arc_easy", n, "ok", "", n, 2376, 0, 0.25, 7, {"acc": acc}, gold, 1.5)
    perplexity = {"perplexity": Metric(900.0 - step, 10.0, None, higher_is_better=False)}
    lambada = LiveTask("lambada_openai", n, "ok", "", n, 5153, 0, None, 0, perplexity, None, 0.5)
    refused = LiveTask("gsm8k", n, "unavailable", "256 tokens to generate leave no room")
    return LiveEvaluation(step, (arc, lambada, refused))


def write_run(tmp_path: Path, evaluations: list[LiveEvaluation]) -> Path:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_config(make_config(run_dir, tmp_path / "data")))
    rows: list[dict[str, Any]] = [{"step": found.step, "tasks_seconds": 2.5} for found in evaluations]
    write_rows(run_dir / "metrics.jsonl", [{"step": 1, "loss": 5.0, "step_seconds": 1.0}, *rows])
    for found in evaluations:
        found.write(run_dir)
    return run_dir


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "evals" / "training" / f"step_{step:08d}.json"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path, [live(step) for step in STEPS])


def test_what_was_written_is_read_again(run_dir: Path) -> None:
    assert read_run_folder(run_dir).live == tuple(live(step) for step in STEPS)


def test_curves_have_every_step_with_its_interval(run_dir: Path) -> None:
    found = {(curve.task, curve.name): curve for curve in build_view(read_run_folder(run_dir))["live"].curves}
    acc = found["arc_easy", "acc"]
    assert (acc.steps, acc.values) == (STEPS, (0.25, 0.35, 0.45))
    assert acc.ci95 == tuple(live(step).tasks[0].metrics["acc"].ci95 for step in STEPS)
    assert (acc.n, acc.n_total, acc.chance) == (100, 2376, 0.25)
    bits = found["arc_easy", "right answer, bits per byte"]
    assert (bits.n, bits.values, bits.higher_is_better) == (95, (2.5, 2.3, 2.1), False)
    assert bits.ci95[0] == pytest.approx((2.5 - 1.96 * 0.05, 2.5 + 1.96 * 0.05), abs=1e-4)
    margin = found["arc_easy", "right answer, margin"]
    assert (margin.values, margin.ci95[0]) == ((-1.0, 1.0, 3.0), None)


def test_the_page_draws_them_and_markdown_and_json_have_the_numbers(run_dir: Path) -> None:
    folder = run_dir / "evals" / "step_00000400"
    write_answers(folder, "arc_easy", [{"acc": float(i % 2)} for i in range(200)], step=400)
    html, markdown, content = write_run_report(run_dir)
    page = read_page(html)
    drawn = squeeze(page.chart_text)
    for text in (
        "arc_easy by step",
        "acc, 100 of 2,376, in training",
        "acc, checkpoints",
        "chance",
        "Bits per byte of right answers",
        "arc_easy, 95 documents",
        "Margin of right answers",
    ):
        assert text in drawn, text
    row = "right answer, bits per byte (lower is better) 95 of 2,376 0 7 0 2.5000 2.4020 to 2.5980 400 2.1000"
    assert row in squeeze(page.text)
    assert "lambada_openai perplexity (lower is better) 100 of 5,153 0 0 0 900.0000 none 400 500.0000" in squeeze(
        page.text
    )
    assert "gsm8k, 3 times from step 0 to 400: 256 tokens to generate leave no room" in squeeze(page.text)
    assert "benchmarks during training 7.5 s 3 times" in squeeze(page.text)
    for number in set(re.findall(r"\d+(?:[.,]\d+)*", page.text)):
        assert number in markdown.read_text(), number
    curves = json.loads(content.read_text())["live"]["curves"]
    assert [curve["values"] for curve in curves if curve["kind"] == "margin"] == [[-1.0, 1.0, 3.0]]


def test_one_checkpoint_alone_is_no_curve(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, [live(0)])
    view = build_view(read_run_folder(run_dir))
    assert step_charts([], view["live"]) == []
    assert right_answer_charts(view["live"]) == []
    assert len(view["live"].curves) == 4  # they are in the table


def test_a_task_of_many_metrics_is_drawn(tmp_path: Path) -> None:
    """As truthfulqa_gen, which has twelve: more than there are colours and markers."""
    run_dir = write_run(tmp_path, [])
    for step in (100, 200):
        right = [{f"acc_{k}": float((i + k) % 2) for k in range(12)} for i in range(4)]
        write_answers(run_dir / "evals" / f"step_{step:08d}", "many", right, step=step)
    view = build_view(read_run_folder(run_dir))
    (drawn,) = step_charts([*view["earlier_scores"], *view["scores"]], view["live"])
    assert all(f"acc_{k}<" in drawn for k in range(12))


def test_a_changed_number_of_documents_begins_another_curve() -> None:
    found = collect([live(0), live(200), live(400, n=50)])
    assert [(c.n, c.steps) for c in found.curves if c.name == "acc"] == [(100, (0, 200)), (50, (400,))]


def test_what_is_no_number_is_left_out_of_the_curve(run_dir: Path) -> None:
    live(200, diverged=True).write(run_dir)
    assert "NaN" not in path_of(run_dir, 200).read_text()
    view = build_view(read_run_folder(run_dir))
    (bits,) = [curve for curve in view["live"].curves if curve.kind == "bits per byte"]
    assert bits.steps == (0, 400)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "no evaluation during training can be read from it"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "format is 9, this version reads 1"),
        (lambda text: text.replace('"step": 200', '"step": 300'), "it is of step 300"),
        (lambda text: text.replace('"n": 100', '"n": "many"'), "n is 'many'"),
        (lambda text: text.replace('"bits_per_byte": 2.3', '"bits_per_byte": "low"'), "could not convert"),
        (lambda text: text.replace('"status": "ok"', '"status": "fine"'), "status is 'fine'"),
        (lambda _: "[]", "no evaluation during training"),
    ],
)
def test_a_damaged_file_is_told_and_costs_its_own_points_only(run_dir: Path, spoil, message: str) -> None:
    path = path_of(run_dir, 200)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(EvalError, match=message):
        LiveEvaluation.read(path)
    run = read_run_folder(run_dir)
    assert [found.step for found in run.live] == [0, 400]
    (told,) = [line for line in run.missing if "step_00000200.json" in line]
    assert message in told
    assert "left out of the curves" in told


def test_steps_that_the_run_made_again_and_files_that_are_gone_are_told(run_dir: Path) -> None:
    live(600).write(run_dir)  # of a stretch that was undone: metrics.jsonl has no such row
    path_of(run_dir, 200).unlink()
    run = read_run_folder(run_dir)
    assert [found.step for found in run.live] == [0, 400]
    (again,) = [line for line in run.missing if "step_00000600.json" in line]
    assert "metrics.jsonl has no evaluation at this step" in again
    assert any("no file of 1 evaluations that metrics.jsonl has (step 200)" in line for line in run.missing)
    html, markdown, _ = write_run_report(run_dir)
    assert "step_00000600.json" in read_page(html).text
    assert "step_00000600.json" in markdown.read_text().replace("\\", "")


def test_files_of_older_versions_have_no_standard_errors(run_dir: Path) -> None:
    content = json.loads(path_of(run_dir, 0).read_text())
    for name in ("bits_per_byte_stderr", "margin_stderr"):
        del content["tasks"][0]["gold"][name]
    path_of(run_dir, 0).write_text(json.dumps(content))
    (arc, *_) = read_run_folder(run_dir).live[0].tasks
    assert arc.gold == replace(live(0).tasks[0].gold, bits_per_byte_stderr=None, margin_stderr=None)


def of_older_version(run_dir: Path, step: int, *tasks: LiveTask) -> None:
    LiveEvaluation(step, tasks).write(run_dir)
    content = json.loads(path_of(run_dir, step).read_text())
    del content["revision"]
    path_of(run_dir, step).write_text(json.dumps(content))


def test_what_an_older_version_got_wrong_is_left_out_and_told(run_dir: Path) -> None:
    """It took truthfulqa_mc2's first answer for the only right one, and MMLU's documents for independent ones."""
    acc = {"acc": Metric(0.4985, 0.0167, (0.4658, 0.5312))}
    gold = GoldScores(100, 3.18, -40.5, 0.1, 0.2)
    mc2 = LiveTask("truthfulqa_mc2", 100, "ok", "", 100, 817, 0, None, 0, acc, gold, 0.5)
    mmlu = LiveTask("mmlu", 10, "ok", "", 570, 14042, 5, 0.25, 0, acc, replace(gold, n=570), 0.5)
    arc = live(0).tasks[0]
    of_older_version(run_dir, 0, mc2, mmlu, arc)
    LiveEvaluation(200, (mmlu,)).write(run_dir)
    run = read_run_folder(run_dir)
    assert [task.gold for task in run.live[0].tasks] == [None, mmlu.gold, arc.gold]
    assert [task.metrics["acc"].ci95 for task in run.live[0].tasks] == [
        acc["acc"].ci95,
        None,
        arc.metrics["acc"].ci95,
    ]
    assert run.live[1].tasks[0] == mmlu
    told = " ".join(run.missing)
    assert "truthfulqa_mc2's right answers: its first one counted as the only one" in told
    assert "1 files of an older version (step 0 to 0): mmlu's intervals: its documents counted as independent" in told


def test_a_groups_interval_in_training_is_clustered_as_that_of_a_checkpoint() -> None:
    leaves = [f"mmlu_{i:02d}" for i in range(24) for _ in range(10)]
    rows = [sample(leaf, i, {"acc": float(int(leaf[-2:]) % 4 == 0 or i % 10 == 0)}) for i, leaf in enumerate(leaves)]
    values = [row["metrics"]["acc"] for row in rows]
    wilson = make_metric(sum(values) / 240, 0.03, 240, is_proportion=True, higher_is_better=True)
    scores = Scores({"acc": wilson}, {}, 240, 14042, 5, 0.25, 0, "1", rows, {})
    found = described(LiveTask("mmlu", 10, "ok"), scores, None)
    assert found.metrics["acc"].stderr == pytest.approx(clustered_stderr(values, leaves))
    assert found.metrics["acc"].ci95[1] - found.metrics["acc"].ci95[0] > 1.5 * (wilson.ci95[1] - wilson.ci95[0])


def test_time_for_benchmarks_is_accounted_for(run_dir: Path) -> None:
    events = [{"event": "started", "step": 0, "start_seconds": 1.0}, {"event": "finished", "step": 400}]
    times = ("2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z")
    write_rows(run_dir / "events.jsonl", [{"time": at, **event} for at, event in zip(times, events, strict=True)])
    spent = {cause: seconds for cause, seconds, _ in build_view(read_run_folder(run_dir))["time"]}
    assert spent["validation"] == "7.5 s"
    assert spent["other"] == "51.5 s"  # of 61, one of them the start and one a step
