"""Benchmarks are scored on the model while it trains, at every layout, and training does not notice."""

from __future__ import annotations

import json
import os

import pytest
from rich.console import Console

from evals.gold import gold_scores
from evals.report_inputs import read_run_folder
from evals.report_steps import collect
from evals.run import EvalRequest, run_evals
from tests.distributed.processes import start
from tests.distributed.runs import metric_rows, saved_state, step_dir
from tests.evals.conftest import tokenizer, tokenizer_file  # noqa: F401 - fixtures
from tests.tiny import run_words

LAST, EVERY, LIMIT = 4, 2, 9
TASKS = "eval.tasks=[megagpt_smoke, megagpt_smoke_generate]"
SUITE = """
description: As the project's own suites, tasks that training leaves out among them.
tasks: [{task: heldout}, {task: megagpt_smoke}, {task: megagpt_smoke_generate}, {task: humaneval}]
"""


def train(words: list[str]) -> int:
    """What launch/pretrain.py does, for `start`."""
    from evals.during import open_benchmarks
    from megagpt.train.run import main

    return main(words, os.environ, open_benchmarks)


def command(run_dir, tokens, tokenizer_file, *more):  # noqa: F811
    return run_words(
        run_dir,
        tokens,
        "model.vocab_size=384",
        "model.max_seq_len=64",
        f"data.tokenizer={tokenizer_file}",
        f"train.max_steps={LAST}",
        "train.micro_batch_size=1",
        *more,
        family="llama" if "model.n_kv_head=2" in more else "gpt2",
    )


GPT2 = ("model.dropout=0.1", "model.n_head=4", "model.d_model=32", "model.n_layer=4")
LLAMA = ("model.n_kv_head=2", "model.n_layer=4", "model.d_model=32", "model.d_ff=64")
TP, PP = "parallel.tensor=2", "parallel.pipeline=2"
ZERO3 = ("parallel.zero_stage=3", "parallel.keep_gathered_below_elements=0")  # every weight is gathered at each use
FAST = {
    "zero 3": (2, (*GPT2, *ZERO3)),
}
MORE = {
    "one process": (1, (*GPT2, "parallel.zero_stage=0")),
    "one process, zero 3": (1, (*GPT2, "parallel.zero_stage=3")),
    "zero 1": (2, GPT2),
    "zero 2": (2, (*LLAMA, "parallel.zero_stage=2")),
    "tensor": (2, (*GPT2, TP)),
    "tensor, sequence cut": (2, (*GPT2, TP, "parallel.tensor_sequence=true")),
    "tensor, zero 3": (4, (*LLAMA, TP, *ZERO3)),
    "zero 3, small weights kept": (2, (*GPT2, "parallel.zero_stage=3")),
    "pipeline": (2, (*GPT2, PP)),
    "pipeline, tensor": (4, (*LLAMA, PP, TP)),
    "dualpipev": (2, (*GPT2, PP, "parallel.pipeline_schedule=dualpipev", "model.n_layer=4")),
    "ulysses": (2, (*LLAMA, "parallel.sequence=2")),
    "bf16, zero 3": (2, (*LLAMA, *ZERO3, "train.dtype=bf16")),
    "bf16, pipeline": (2, (*GPT2, PP, "train.dtype=bf16")),
    "recomputed": (2, (*GPT2, "train.recompute=full", *ZERO3)),
    "one micro-batch": (2, (*GPT2, *ZERO3, "train.micro_batch_size=4")),
}


def check(case, tmp_path, tokens, tokenizer_file):  # noqa: F811
    world_size, words = case
    plain, scored = tmp_path / "plain", tmp_path / "scored"
    start(train, world_size, command(plain, tokens, tokenizer_file, *words), log=tmp_path / "plain.log").finish(120)
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE)
    tasks = (f"eval.tasks=[{suite}]", f"eval.tasks_every={EVERY}", f"eval.tasks_limit={LIMIT}")
    more = (*words, *tasks, "eval.tasks_batch_size=3", "log.progress=true")
    group = start(train, world_size, command(scored, tokens, tokenizer_file, *more), log=tmp_path / "scored.log")
    group.finish(120)
    said = " ".join(group.output().split())
    for task in ("heldout", "humaneval"):
        assert said.count(f"eval.tasks: {task} is not scored during training: ") == 1
    rows = metric_rows(scored)
    evaluated = [row for row in rows if "tasks_seconds" in row]
    # The trajectory, to the last bit.
    assert [row for row in rows if "loss" in row] == metric_rows(plain)
    assert saved_state(step_dir(scored, LAST))[0] == saved_state(step_dir(plain, LAST))[0]
    # The scores: those of the checkpoint that was saved at the same step.
    assert [row["step"] for row in evaluated] == list(range(0, LAST + 1, EVERY))
    values = [row["eval/megagpt_smoke/gold_bits_per_byte"] for row in evaluated]
    assert len(set(values)) == len(values), "each step has weights of its own"
    dtype = "bf16" if "train.dtype=bf16" in words else "fp32"
    request = EvalRequest(scored, ("megagpt_smoke", "megagpt_smoke_generate"), limit=LIMIT, batch_size=3, dtype=dtype)
    smoke, generated = run_evals(request, Console(quiet=True))
    samples = scored / "evals" / f"step_{LAST:08d}" / "megagpt_smoke.samples.jsonl"
    gold = gold_scores([json.loads(line) for line in samples.read_text().splitlines()])
    assert gold is not None
    last = evaluated[-1]
    if dtype == "fp32":
        assert last["eval/megagpt_smoke/acc"] == smoke.metrics["acc"].value
        assert last["eval/megagpt_smoke_generate/exact_match"] == generated.metrics["exact_match"].value
    # Bit for bit, but where products are summed over a tensor group in training's order, or rounded to half precision.
    close = 5e-3 if dtype == "bf16" else 2e-6 if TP in words else 0
    assert last["eval/megagpt_smoke/gold_bits_per_byte"] == pytest.approx(gold.bits_per_byte, abs=close, rel=0)
    assert last["eval/megagpt_smoke/gold_margin"] == pytest.approx(gold.margin, abs=10 * close, rel=0)
    told = json.loads((scored / "evals" / "training" / f"step_{LAST:08d}.json").read_text())
    assert [(row["task"], row["status"], row["n"]) for row in told["tasks"]] == [
        ("megagpt_smoke", "ok", LIMIT),
        ("megagpt_smoke_generate", "ok", LIMIT),
    ]
    assert told["tasks"][0]["gold"]["n"] == LIMIT
    # The report finds every step.
    run = read_run_folder(scored)
    assert [evaluation.step for evaluation in run.live] == list(range(0, LAST + 1, EVERY))
    assert not [line for line in run.missing if "evals/training" in line]
    curves = {(curve.task, curve.name): curve.values for curve in collect(run.live).curves}
    assert curves["megagpt_smoke", "right answer, bits per byte"] == tuple(values)


@pytest.mark.parametrize("case", FAST.values(), ids=FAST)
def test_scores_are_those_of_the_checkpoint_and_training_goes_on_as_without(case, tmp_path, tokens, tokenizer_file):  # noqa: F811
    check(case, tmp_path, tokens, tokenizer_file)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", MORE.values(), ids=MORE)
def test_scores_and_trajectory_at_every_layout(case, tmp_path, tokens, tokenizer_file):  # noqa: F811
    check(case, tmp_path, tokens, tokenizer_file)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        # lm-eval looks through all of its definitions.
        pytest.param(
            "eval.tasks=[no_such_task]", "there is no task 'no_such_task' in lm-eval", marks=pytest.mark.exhaustive
        ),
        ("data.tokenizer=null", "the token files have no manifest.json that names their tokenizer"),
    ],
)
def test_what_cannot_be_scored_is_told_before_training(word, message, tmp_path, tokens, tokenizer_file):  # noqa: F811
    words = command(tmp_path / "run", tokens, tokenizer_file, TASKS, "eval.tasks_every=2", word)
    group = start(train, 1, words, log=tmp_path / "log")
    assert group.wait(60) == [2]
    assert message in " ".join(group.output().split())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_training_that_was_started_without_benchmarks_refuses_them(tmp_path, tokens, tokenizer_file):  # noqa: F811
    from tests.distributed.processes import train_command

    words = command(tmp_path / "run", tokens, tokenizer_file, TASKS, "eval.tasks_every=2")
    group = start(train_command, 1, words, log=tmp_path / "log")
    assert group.wait(60) == [2]
    assert "use launch/pretrain.py" in " ".join(group.output().split())
