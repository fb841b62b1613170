"""A checkpoint in, result files out: contents, reuse, unavailable data, suites."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from evals import task_loader
from evals.results import TaskResult, format_table, make_metric
from evals.run import EvalRequest, run_evals
from evals.stats import wilson_interval
from evals.suites import Suite, resolve_tasks
from megagpt.config.load import load_config
from megagpt.errors import EvalError
from tests.evals.conftest import save_run

SUITES = Path(__file__).resolve().parents[2] / "configs" / "evals"
CONSOLE = Console(quiet=True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    return save_run(tmp_path_factory.mktemp("runs") / "a", tokenizer)


def evaluate(run_dir: Path, *tasks: str, **settings) -> list[TaskResult]:
    return run_evals(EvalRequest(run_dir, tasks, suites_dir=SUITES, **settings), CONSOLE)


def test_a_result_file_says_score_interval_settings_data_and_weights(run_dir: Path) -> None:
    (result,) = evaluate(run_dir, "megagpt_smoke", limit=12)
    folder = run_dir / "evals" / "step_00000010"
    content = json.loads((folder / "megagpt_smoke.json").read_text())
    assert content["format"] == 1
    assert (content["status"], content["n"], content["n_total"], content["n_shots"]) == ("ok", 12, 28, 0)
    assert content["checkpoint"] == {"run": str(run_dir), "step": 10, "hash": result.checkpoint["hash"]}
    assert content["settings"] == {
        "n_shots": None,
        "limit": 12,
        "batch_size": 16,
        "dtype": "fp32",
        "max_seq_len": 192,
    }
    assert content["data"]["origin"] == "package"
    assert content["chance"] == 0.25
    acc = content["metrics"]["acc"]
    assert acc["ci95"] == pytest.approx(wilson_interval(acc["value"] * 12, 12))
    samples = [json.loads(line) for line in (folder / content["samples"]).read_text().splitlines()]
    assert len(samples) == 12
    assert sum(sample["correct"] for sample in samples) == round(acc["value"] * 12)
    assert len(samples[0]["logprobs"]) == 4
    assert not list(folder.glob("*.tmp"))


def test_a_result_file_says_what_was_computed_and_whether_the_batch_matters(run_dir: Path, tmp_path: Path) -> None:
    shared, alone = (
        evaluate(run_dir, "megagpt_smoke", limit=6, out=tmp_path / str(share), share_prefixes=share)[0]
        for share in (True, False)
    )
    plain = evaluate(run_dir, "megagpt_smoke", limit=6, out=tmp_path / "plain", batch_invariant=False)[0]
    content = json.loads((tmp_path / "True" / "megagpt_smoke.json").read_text())
    assert 0 < content["tokens_computed"] < alone.tokens_computed <= content["tokens_naive"]
    assert (content["batch_invariant"], plain.batch_invariant) == (True, False)
    assert (content["answers_resumed"], content["answers_damaged"]) == (0, 0)
    assert shared.metrics == alone.metrics
    for task in ("megagpt_smoke_generate", "heldout"):  # nothing is shared
        (other,) = evaluate(run_dir, task, limit=4, out=tmp_path / "other")
        assert 0 < other.tokens_computed == other.tokens_naive


def test_a_result_file_of_before_these_fields_is_read(run_dir: Path, tmp_path: Path) -> None:
    evaluate(run_dir, "megagpt_smoke", limit=4, out=tmp_path)
    path = tmp_path / "megagpt_smoke.json"
    content = json.loads(path.read_text())
    for name in ("tokens_computed", "tokens_naive", "answers_resumed", "answers_damaged", "batch_invariant"):
        del content[name]
    path.write_text(json.dumps(content))
    (again,) = evaluate(run_dir, "megagpt_smoke", limit=4, out=tmp_path)
    assert again.reused
    assert (again.tokens_computed, again.batch_invariant) == (0, None)


def test_the_same_weights_settings_and_data_are_not_evaluated_twice(run_dir: Path) -> None:
    (first,) = evaluate(run_dir, "megagpt_smoke_generate", limit=4)
    (again,) = evaluate(run_dir, "megagpt_smoke_generate", limit=4)
    (other,) = evaluate(run_dir, "megagpt_smoke_generate", limit=5)
    assert (first.reused, again.reused, other.reused) == (False, True, False)
    assert replace(again, reused=False) == first
    assert other.n == 5


def test_other_weights_never_reuse_a_result(run_dir: Path, tmp_path: Path, tokenizer) -> None:
    other = save_run(tmp_path / "b", tokenizer, seed=1)
    out = tmp_path / "out"
    (first,) = evaluate(run_dir, "megagpt_smoke", limit=4, out=out)
    (second,) = evaluate(other, "megagpt_smoke", limit=4, out=out)
    assert first.checkpoint["step"] == second.checkpoint["step"]
    assert first.checkpoint["hash"] != second.checkpoint["hash"]
    assert not second.reused


def test_data_that_cannot_be_reached_gives_a_row_with_the_reason(run_dir: Path, monkeypatch, tmp_path: Path) -> None:
    # Port 9 of this machine: refused at once, as a hub without a network is refused.
    monkeypatch.setattr(task_loader.hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    gone, smoke = evaluate(run_dir, "arc_easy", "megagpt_smoke", limit=4, out=tmp_path)
    assert gone.status == "unavailable"
    assert "the hub cannot be reached (http://127.0.0.1:9: " in gone.reason
    assert "\n" not in gone.reason
    assert json.loads((tmp_path / "arc_easy.json").read_text())["status"] == "unavailable"
    assert smoke.status == "ok"


def test_an_unavailable_row_does_not_replace_a_score_of_the_same_weights(run_dir, monkeypatch, tmp_path) -> None:
    (scored,) = evaluate(run_dir, "megagpt_smoke", limit=4, out=tmp_path)
    replace(scored, task="arc_easy").write(tmp_path)
    monkeypatch.setattr(task_loader.hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    assert evaluate(run_dir, "arc_easy", limit=4, out=tmp_path)[0].status == "unavailable"
    assert TaskResult.read(tmp_path / "arc_easy.json").status == "ok"


def test_a_task_too_long_for_the_models_context_gives_a_row_with_the_reason(run_dir: Path, tmp_path: Path) -> None:
    from evals.data import write_dataset
    from tests.evals.fixtures import gsm8k_rows

    rows = {"train": gsm8k_rows()[:1] * 7473, "test": gsm8k_rows()[:1] * 1319}
    write_dataset(tmp_path / "hub", "openai/gsm8k", {"main": rows})
    (result,) = evaluate(run_dir, "gsm8k", limit=1, data_dir=tmp_path / "hub", out=tmp_path)
    assert result.status == "unavailable"
    assert "gsm8k generates 256 tokens, but the model's context is 192" in result.reason


def test_heldout_scores_the_runs_validation_tokens_and_is_reused(run_dir: Path) -> None:
    (result,) = evaluate(run_dir, "heldout", limit=3)
    assert list(result.metrics) == ["bits_per_byte", "nats_per_token"]
    assert not result.metrics["bits_per_byte"].higher_is_better
    low, high = result.metrics["nats_per_token"].ci95
    assert low < result.metrics["nats_per_token"].value < high
    assert evaluate(run_dir, "heldout", limit=3)[0].reused


def test_a_damaged_result_file_is_an_error_and_not_a_score(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "megagpt_smoke.json").write_text('{"format": 1, "task"')
    with pytest.raises(EvalError, match="not a result file of format 1"):
        evaluate(run_dir, "megagpt_smoke", limit=4, out=tmp_path)


def test_wilsons_interval_of_eight_in_ten() -> None:
    # Newcombe 1998, Statistics in Medicine 17, gives 0.490 to 0.943 for 8 of 10.
    assert wilson_interval(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)
    assert wilson_interval(0, 10)[0] == 0.0


def test_a_mean_that_is_no_proportion_gets_the_normal_interval() -> None:
    metric = make_metric(0.5, 0.1, 100, is_proportion=False, higher_is_better=True)
    assert metric.ci95 == pytest.approx((0.304, 0.696), abs=1e-3)


def test_the_table_shows_scores_and_reasons(run_dir: Path, tmp_path: Path) -> None:
    (scored,) = evaluate(run_dir, "megagpt_smoke", limit=4, out=tmp_path)
    gone = replace(scored, task="gone", status="unavailable", reason="no data", metrics={})
    console = Console(record=True, file=io.StringIO(), width=160)
    console.print(format_table([scored, gone]))
    text = console.export_text()
    assert "4 of 28" in text
    assert "no data" in text


@pytest.mark.parametrize("name", ["core", "fast"])
def test_the_suites_of_the_project_load(name: str) -> None:
    suite = load_config(Suite, [SUITES / f"{name}.yaml"])
    tasks = {task.task for task in suite.tasks}
    assert {"heldout", "arc_easy", "hellaswag", "mmlu", "gsm8k"} <= tasks


def test_suites_and_tasks_may_be_mixed_and_the_command_line_overrides() -> None:
    tasks = resolve_tasks(("fast", "arc_challenge"), SUITES, limit=3)
    assert tasks[-1].task == "arc_challenge"
    assert {task.limit for task in tasks} == {3}


def test_one_task_with_two_settings_is_an_error() -> None:
    with pytest.raises(EvalError, match="arc_easy is asked for twice"):
        resolve_tasks(("fast", "arc_easy"), SUITES)
