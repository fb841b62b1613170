"""Scores do not depend on how many processes find them, or on how these share the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from evals.run import run_evals
from evals.together import Layout
from tests.distributed.evaluate_jobs import evaluate, requests, score_cut_vocabulary
from tests.distributed.processes import start
from tests.distributed.runs import train_to_the_end
from tests.evals.conftest import save_run, tokenizer, tokenizer_file  # noqa: F401 - fixtures
from tests.tiny import run_words

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
NEVER_ANSWERS = """
import os, runpy, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
from evals.forwards import PlanRunner

def wait(*_):
    (Path(__file__).parent / f"asked {os.environ['RANK']}").touch()
    time.sleep(1000)

PlanRunner._collect = wait
runpy.run_path("launch/evaluate.py", run_name="__main__")
"""
QUESTIONS_FIRST = ("megagpt_smoke", "megagpt_smoke_generate", "heldout")
"""The order for faults, which are in questions; the scores are those of any order."""


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory, tokenizer):  # noqa: F811
    folder = tmp_path_factory.mktemp("evaluated")
    return {family: save_run(folder / family, tokenizer, family=family) for family in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def expected(run_dirs, tmp_path_factory):
    """What one process finds."""
    folder = tmp_path_factory.mktemp("expected")
    for family, run_dir in run_dirs.items():
        run_evals(requests(run_dir, folder / family), QUIET)
    return {family: found(folder / family) for family in run_dirs}


def found(out):
    """Metrics of each task, and the log-probabilities and texts of its answers."""
    metrics, answers = {}, {}
    for path in sorted(out.glob("*.json")):
        content = json.loads(path.read_text())
        assert content["status"] == "ok", content["reason"]
        metrics[content["task"]] = content["metrics"]
        if content["samples"]:
            lines = [json.loads(line) for line in (out / content["samples"]).read_text().splitlines()]
            answers[content["task"]] = [line.get("logprobs") or line["raw_response"] for line in lines]
    assert len(metrics) == 3
    assert len(answers["megagpt_smoke"]) == 18
    return metrics, answers


LAYOUTS = {
    "data 2": ("gpt2", 2, Layout()),
    "zero 3": ("gpt2", 2, Layout(cut_weights=True)),
    "tensor 2, pipeline 2": ("llama", 4, Layout(tensor=2, pipeline=2)),
}
MORE = {
    "data 4": ("llama", 4, Layout()),
    "tensor 2": ("gpt2", 2, Layout(tensor=2)),
    "tensor 4, fewer key heads": ("llama", 4, Layout(tensor=4)),
    "pipeline 2": ("gpt2", 2, Layout(pipeline=2)),
    "pipeline 2, data 2": ("llama", 4, Layout(pipeline=2)),
    "tensor 2, data 2": ("gpt2", 4, Layout(tensor=2)),
    "zero 3, four processes": ("llama", 4, Layout(cut_weights=True)),
    "zero 3, tensor 2": ("llama", 4, Layout(tensor=2, cut_weights=True)),
}


def check(layout, run_dirs, expected, tmp_path):
    family, processes, shared = layout
    request = requests(run_dirs[family], tmp_path / "out")
    start(evaluate, processes, request, shared, log=tmp_path / "log").finish()
    metrics, answers = found(tmp_path / "out")
    expected_metrics, expected_answers = expected[family]
    if shared.tensor < 4:
        assert answers == expected_answers  # bit for bit
        assert metrics == expected_metrics
        return
    # Eight columns a process: MKL multiplies so narrow a matrix by another routine.
    for task in ("megagpt_smoke", "megagpt_smoke_generate"):
        assert metrics[task] == expected_metrics[task]
    assert answers["megagpt_smoke_generate"] == expected_answers["megagpt_smoke_generate"]
    for one, other in zip(answers["megagpt_smoke"], expected_answers["megagpt_smoke"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    nats = metrics["heldout"]["nats_per_token"]["value"]
    assert nats == pytest.approx(expected_metrics["heldout"]["nats_per_token"]["value"], abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_scores_do_not_depend_on_the_layout(layout, run_dirs, expected, tmp_path):
    check(layout, run_dirs, expected, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", MORE.values(), ids=MORE)
def test_scores_do_not_depend_on_any_layout(layout, run_dirs, expected, tmp_path):
    check(layout, run_dirs, expected, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_do_not_depend_on_the_batch_either(batch_size, run_dirs, expected, tmp_path):
    request = requests(run_dirs["gpt2"], tmp_path / "out", batch_size)
    start(evaluate, 2, request, Layout(), log=tmp_path / "log").finish()
    assert found(tmp_path / "out") == expected["gpt2"]


def test_padding_never_counts_and_the_first_of_equal_logits_wins_wherever_it_lies(tmp_path):
    start(score_cut_vocabulary, 2, log=tmp_path / "log").finish()


def test_an_error_on_one_process_is_the_error_of_all(run_dirs, tmp_path):
    request = replace(requests(run_dirs["gpt2"], tmp_path / "out"), tasks=QUESTIONS_FIRST)
    group = start(evaluate, 2, request, Layout(), "an error of ours", log=tmp_path / "log")
    assert group.wait(60) == [2, 2]
    assert {f"rank {rank}: this question has no answer" for rank in (0, 1)} <= set(group.output().splitlines())


@pytest.mark.exhaustive
def test_processes_that_build_other_requests_stop_before_they_score(run_dirs, tmp_path):
    request = replace(requests(run_dirs["gpt2"], tmp_path / "out"), tasks=QUESTIONS_FIRST)
    group = start(evaluate, 2, request, Layout(), "other limit", log=tmp_path / "log")
    assert group.wait(60) == [2, 2]
    assert group.output().count("the requests of rank 1 are not those of rank 0") == 2
    assert not list((tmp_path / "out").glob("*.json"))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2)], ids=["data", "tensor", "pipeline"])
def test_a_process_that_crashes_ends_the_others_at_once(tensor, pipeline, run_dirs, tmp_path):
    request = replace(requests(run_dirs["gpt2"], tmp_path / "out"), tasks=QUESTIONS_FIRST)
    began = time.monotonic()
    group = start(evaluate, 2, request, Layout(tensor, pipeline), "a crash", log=tmp_path / "log")
    codes = group.wait(60)
    assert all(codes), group.output()
    assert time.monotonic() - began < 45
    assert "out of something" in group.output()


@pytest.mark.exhaustive
def test_what_several_processes_had_answered_when_one_was_killed_is_not_asked_again(run_dirs, expected, tmp_path):
    request = replace(requests(run_dirs["gpt2"], tmp_path / "out"), tasks=QUESTIONS_FIRST)
    start(evaluate, 2, request, Layout(), "a crash", log=tmp_path / "log").wait(60)
    assert not list((tmp_path / "out").glob("*.json"))
    smoke, *_ = run_evals(request, QUIET)
    assert 0 < smoke.answers_resumed < 4 * 18
    assert found(tmp_path / "out") == expected["gpt2"]
    assert not list((tmp_path / "out" / "answers").iterdir())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("family", "processes", "tensor", "changes", "is_shared"),
    [
        ("gpt2", 2, 2, {}, True),  # the same bits as of one process
        ("llama", 4, 4, {}, False),  # eight columns a process: other bits
        ("gpt2", 2, 1, {"dtype": "bf16"}, False),
        ("gpt2", 2, 1, {"batch_invariant": False}, False),
    ],
    ids=["tensor 2", "tensor 4", "bf16", "not invariant"],
)
def test_another_layout_takes_answers_only_where_they_are_the_same_numbers(
    family, processes, tensor, changes, is_shared, run_dirs, tmp_path
):
    request = replace(requests(run_dirs[family], tmp_path / "out"), tasks=QUESTIONS_FIRST, **changes)
    start(evaluate, processes, request, Layout(tensor), "a late crash", log=tmp_path / "log").wait(60)
    assert not list((tmp_path / "out").glob("megagpt_smoke.json"))
    assert list((tmp_path / "out" / "answers").iterdir())
    smoke, *_ = run_evals(request, QUIET)
    assert (smoke.answers_resumed > 0) is is_shared
    run_evals(replace(request, out=tmp_path / "whole"), QUIET)
    assert found(tmp_path / "out") == found(tmp_path / "whole")


@pytest.mark.exhaustive
def test_a_number_of_processes_that_does_not_divide_is_refused(run_dirs, tmp_path):
    group = start(evaluate, 3, requests(run_dirs["gpt2"], tmp_path / "out"), Layout(tensor=2), log=tmp_path / "log")
    assert group.wait(60) == [2, 2, 2]
    assert "3 processes, which do not divide by --tensor 2 x --pipeline 1 = 2" in group.output()


@pytest.mark.exhaustive
def test_a_checkpoint_of_zero_3_is_evaluated_at_any_layout(tmp_path, tokens, tokenizer_file):  # noqa: F811
    words = run_words(
        tmp_path / "run",
        tokens,
        "parallel.zero_stage=3",
        "train.max_steps=4",
        "model.d_model=32",
        "model.vocab_size=384",
        "model.max_seq_len=64",
        f"data.val={tokens}",
        f"data.tokenizer={tokenizer_file}",
    )
    train_to_the_end(words, tmp_path / "train.log", 2)
    run_evals(requests(tmp_path / "run", tmp_path / "one"), QUIET)
    for name, tensor, pipeline in (("data", 1, 1), ("tensor", 2, 1), ("pipeline", 1, 2)):
        request = requests(tmp_path / "run", tmp_path / name)
        start(evaluate, 2, request, Layout(tensor, pipeline), log=tmp_path / f"{name}.log").finish()
        metrics, answers = found(tmp_path / name)
        assert (metrics, answers) == found(tmp_path / "one")


@pytest.mark.exhaustive
def test_the_launcher_runs_it(run_dirs, expected, tmp_path, tokenizer):  # noqa: F811
    run_dir = save_run(tmp_path / "run", tokenizer)
    command = [DEEPSPEED, "--num_accelerators", "2", "launch/evaluate.py"]
    words = ["--checkpoint", str(run_dir), "--tasks", "megagpt_smoke", "--limit", "18", "--batch-size", "4"]
    done = subprocess.run(
        [*command, *words, "--pipeline", "2"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("megagpt_smoke: acc") == 1  # one process speaks
    content = json.loads((run_dir / "evals" / "step_00000010" / "megagpt_smoke.json").read_text())
    assert content["metrics"] == expected["gpt2"][0]["megagpt_smoke"]


@pytest.mark.exhaustive
def test_its_processes_end_with_the_launcher(tmp_path, tokenizer):  # noqa: F811
    """A scheduler kills `deepspeed` alone; they would go on for hours, on cards that it has given to others."""
    run_dir = save_run(tmp_path / "run", tokenizer)
    script = tmp_path / "evaluate.py"
    script.write_text(NEVER_ANSWERS)
    command = [DEEPSPEED, "--num_accelerators", "2", str(script), "--checkpoint", str(run_dir)]
    with (tmp_path / "log").open("wb") as log:
        deepspeed = subprocess.Popen(
            [*command, "--tasks", "megagpt_smoke"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + 120
        while not all((tmp_path / f"asked {rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < until, (tmp_path / "log").read_text()
            assert deepspeed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
    finally:
        deepspeed.kill()
        deepspeed.wait()
        gone, left = psutil.wait_procs(processes_of(script), timeout=15)
        for process in left:
            process.kill()
    assert (len(gone), left) == (3, []), (tmp_path / "log").read_text()  # launch.py and two ranks
    assert "the launcher had ended during eval at step 0; nothing was to be saved" in (tmp_path / "log").read_text()


def processes_of(script):
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if str(script) in (process.info["cmdline"] or ())]
