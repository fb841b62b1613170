"""What stands beside a score: in the report's three forms, and in the table of the command line."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evals.baselines import load_baselines
from evals.caveats import FASTCHAT_TOKENS, caveats, judged_caveats
from evals.humaneval import pass_metrics
from evals.mt_bench.answers import MAX_NEW_TOKENS
from evals.report import build_view, write_run_report
from evals.report_examples import examples
from evals.report_inputs import read_run_folder
from evals.results import Metric, TaskResult, format_table
from evals.sample_files import document_scores
from evals.stats import pass_at_k
from megagpt.config.load import dump_config
from tests.evals.result_files import make_result, sample, write_answers
from tests.evals.test_report import make_config, read_page, squeeze, write_json, write_rows

ARC = [{"acc": float(i % 2)} for i in range(20)]
PASSED = [0, 1, 5, 20, 0, 0, 3, 10, 0, 20]
"""Of ten problems with 20 completions each."""


def completions() -> list[dict]:
    return [
        sample("humaneval", problem, {"pass@1": float(i < passed)}, choices=None, logprobs=None, sample=i)
        for problem, passed in enumerate(PASSED)
        for i in range(20)
    ]


def write_run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    folder = run_dir / "evals" / "step_00000100"
    settings = {"limit": None, "dtype": "bf16", "max_seq_len": 512}
    environment = {"torch": "2.13.0", "device": "cuda", "device_name": "H100", "code": "c0de" * 16}
    write_answers(folder, "arc_easy", ARC, settings=settings, environment=environment, batch_invariant=False)
    write_answers(folder, "mmlu", ARC, n_shots=5, truncated=19, settings=settings)
    data = {"origin": "local", "path_or_id": "d", "sha256": "s", "absent_splits": ["train"], "checksum": "differs"}
    splits = {"scored": ["validation"], "examples": ["validation"]}
    write_answers(folder, "hellaswag", ARC, n_shots=10, data=data, splits=splits)
    metrics = pass_metrics(PASSED, 20)
    reason = "136 failed; completions have 256 tokens at most, as the context has no room for 1024"
    make_result("humaneval", metrics, n=10, n_total=10, reason=reason).write(folder, completions())
    points = {"average": Metric(3.25, 0.1, (3.05, 3.45))}
    judge = {"judge": "judge-7b", "max_new_tokens": 256}
    make_result("mt_bench", points, n=80, n_total=80, truncated=7, settings=judge).write(folder)
    (run_dir / "config.yaml").write_text(dump_config(make_config(run_dir, tmp_path / "data")))
    write_rows(run_dir / "metrics.jsonl", [{"step": 100, "loss": 4.0, "tokens": 600, "step_seconds": 1.0}])
    dirty = {"items": 10, "dirty": [1, 2, 3], "clean": [0, 4, 5, 6, 7, 8, 9], "not_matchable": [], "common": 0}
    write_json(
        run_dir / "evals" / "contamination.json",
        {
            "format": 1,
            "scanned": [{"prefix": str(tmp_path / "data" / "docs_train"), "tokens": 1000, "documents": 9}],
            "listed": None,
            "data": {"humaneval": "sha-humaneval"},
            "leaves": {"humaneval": ["humaneval"]},
            "tasks": {"humaneval": {**dirty, "listed": []}},
        },
    )
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("caveats"))


@pytest.fixture(scope="module")
def texts(run_dir: Path) -> tuple[str, str, dict]:
    """The page's text, Markdown, and what the JSON holds."""
    html, markdown, content = write_run_report(run_dir)
    return squeeze(read_page(html).text), squeeze(markdown.read_text()), json.loads(content.read_text())


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("humaneval", "completions have 256 tokens at most, as the context has no room for 1024"),
        (
            "mmlu",
            "most prompts are cut: 19 of 20 prompts lost their beginning, being longer than the model's context of 512 "
            "tokens; this is no score with all 5 worked examples and not comparable with others",
        ),
        ("hellaswag", "the official number of rows but are not the copy that was checked: scores may differ"),
        (
            "hellaswag",
            "the 10 worked examples of a prompt were drawn from validation, which is scored too (never the document "
            "itself): the data has no train",
        ),
    ],
)
def test_what_a_score_hangs_on_stands_beside_it_in_all_three_forms(texts, task, told) -> None:
    page, markdown, content = texts
    assert told in page
    (row,) = [line for line in markdown.split("| 100 |") if f" {task} | " in line[: len(task) + 4] and told in line][:1]
    assert row
    assert any(told in line for score in content["scores"] if score["task"] == task for line in score["told"])


def test_most_prompts_cut_is_marked_in_the_row_itself(texts) -> None:
    page, markdown, content = texts
    assert "19: most" in page
    assert "| 19: most |" in markdown
    assert {score["task"] for score in content["scores"] if score["is_mostly_cut"]} == {"mmlu"}


def test_precision_context_batch_and_what_computed_it_are_shown_and_a_dash_where_a_file_does_not_say(texts) -> None:
    page, markdown, _ = texts
    assert "bf16 512 no 2.13.0 cuda, H100 c0dec0dec0de" in page
    assert "| bf16 | 512 | no | 2.13.0 | cuda, H100 | c0dec0dec0de |" in markdown
    assert "| fp32 | 1,024 | - | - | - | - |" in markdown  # humaneval's, as of an older version


def test_short_answers_to_mt_bench_are_a_deviation_and_cut_prompts_are_counted_in_questions(texts) -> None:
    assert FASTCHAT_TOKENS == MAX_NEW_TOKENS
    for text in texts[:2]:
        assert "an answer has 256 tokens at most where FastChat's have 1,024" in text
        assert "Questions with a turn whose prompt lost its beginning: 7 of 80." in text
    whole = make_result("mt_bench", {}, settings={"judge": "j", "max_new_tokens": MAX_NEW_TOKENS})
    assert judged_caveats(whole) == ()


def test_a_clean_result_has_nothing_to_know_and_the_command_line_says_what_others_have() -> None:
    clean = make_result("arc_easy", {"acc": Metric(0.5)}, n=10, n_total=10)
    assert caveats(clean) == ()
    some = replace(clean, task="arc_challenge", truncated=1)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_table([clean, some]))
    text = squeeze(console.export_text())
    assert "arc_challenge: 1 of 10 prompts lost their beginning, being longer than the model's context of 1,024" in text
    assert "arc_easy:" not in text


def test_older_result_files_are_read_and_say_what_is_not_known(tmp_path: Path) -> None:
    data = {"origin": "local", "path_or_id": "d", "sha256": "s", "absent_splits": ["train"]}
    make_result("hellaswag", {"acc": Metric(0.5)}, n=10, n_total=10, n_shots=10, data=data).write(tmp_path)
    path = tmp_path / "hellaswag.json"
    content = json.loads(path.read_text())
    del content["splits"], content["environment"]
    path.write_text(json.dumps(content))
    read = TaskResult.read(path)
    assert (read.splits, read.environment) == ({}, {})
    assert caveats(read) == ("the 10 worked examples of a prompt were not drawn from train: the data has no train",)


def test_older_samples_of_truthfulqa_mc2_are_not_believed(tmp_path: Path) -> None:
    """They called every answer correct, whatever it scored, and named choice 0 as the target of all."""
    rows = [sample("truthfulqa_mc2", i, {"acc": value}, target=0, correct=True) for i, value in enumerate((1e-49, 0.9))]
    found = examples(7, "truthfulqa_mc2", rows)
    assert [(e.document, e.is_right, e.score) for e in found] == [("1", None, 0.9), ("0", None, 1e-49)]
    assert all(choice.is_right is None for e in found for choice in e.choices)


# ---- several answers to one document


def test_a_problem_with_several_completions_is_one_document(run_dir: Path) -> None:
    result = make_result("humaneval", pass_metrics(PASSED, 20), n=10, n_total=10)
    found = document_scores(result, completions())
    assert set(found) == {"pass@1", "pass@10"}
    for k, name in ((1, "pass@1"), (10, "pass@10")):
        assert found[name].values == pytest.approx([pass_at_k(20, passed, k) for passed in PASSED])
        assert len(set(found[name].keys)) == len(found[name].keys) == 10


def test_contamination_counts_problems_and_not_completions(run_dir: Path, texts) -> None:
    splits = {row.metric: row for row in build_view(read_run_folder(run_dir))["contamination"]["splits"]}
    result = TaskResult.read(run_dir / "evals" / "step_00000100" / "humaneval.json")
    for name, row in splits.items():
        assert (row.full.n, row.clean.n, row.dirty.n) == (10, 7, 3)
        assert row.full.score.value == pytest.approx(result.metrics[name].value)
        assert row.full.score.ci95 == pytest.approx(result.metrics[name].ci95)
    assert set(splits) == {"pass@1", "pass@10"}
    assert splits["pass@10"].dirty.score.value == pytest.approx(sum(pass_at_k(20, c, 10) for c in (1, 5, 20)) / 3)


def test_the_report_says_how_much_of_what_was_scanned_the_weights_had_seen(texts) -> None:
    for text in texts[:2]:
        assert (
            "All 1,000 tokens of the run's token files were looked at, of which the scored weights had seen 600" in text
        )


# ---- where nothing published is comparable


def test_where_nothing_is_comparable_the_nearest_are_named_with_how_they_differ(texts) -> None:
    page, markdown, content = texts
    for text in (page, markdown):
        assert "No published score of this task is comparable with ours" in text
        assert "Nothing is published of equal compute" in text
    assert "Pythia-70M 70.43 M acc 5 0.2471 defined otherwise: hendrycks_test pythia" in page
    assert "| Pythia-70M | 70.43 M | acc | 5 | 0.2471 | defined otherwise: hendrycks_test | pythia |" in markdown
    assert "hendrycks_test lm-eval 0.3 hendrycksTest: another prompt" in page
    for one in content["published"]:
        neighbours = one["neighbours"]
        assert bool(neighbours["comparable"]) != bool(neighbours["nearest_apart"])


def test_scores_of_about_equal_size_that_are_not_comparable_are_named() -> None:
    found = load_baselines().neighbours("arc_easy", "acc_norm", 0, parameters=160_000_000, tokens=None)
    assert "Pythia-160M" in [score.label for score in found.apart_for("5 shots, ours has 0 shots")]
    assert found.nearest_apart == ()
