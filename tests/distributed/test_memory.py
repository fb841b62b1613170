"""Tensors of every process, counted over a real step, are what the formulas say within 10 %."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from megagpt.bench.layouts import LAYOUTS, bench_layouts, to_json
from megagpt.bench.processes import run_group
from megagpt.errors import ConfigError, MegaGPTError
from megagpt.model.memory import held_parameters
from megagpt.parallel.memory import in_flight, memory_layout, worst_stage
from megagpt.parallel.plan import plan_batches
from tests.tiny import run_config

SMALL = ["model.n_layer=4", "model.d_model=128", "model.vocab_size=1024", "model.max_seq_len=256"]
FAST = ["zero1", "zero1-dp2", "zero2-dp2", "zero3-dp2", "tensor2", "pipeline2", "full", "offload"]


def measure(family, names, *overrides):
    rows = bench_layouts(family, names, overrides, Console(file=StringIO(), width=200))
    return {row.layout: row for row in rows}


def check(rows):
    for name, row in rows.items():
        assert row.ratios == pytest.approx([1.0] * row.processes, abs=0.1), name


@pytest.fixture(scope="module")
def fast():
    return measure("gpt2", FAST, *SMALL)


def test_peak_memory_is_what_the_formulas_say(fast):
    check(fast)


def test_memory_falls_with_zero_tensor_pipeline_and_recompute(fast):
    measured = {name: row.measured_bytes for name, row in fast.items()}
    assert measured["zero1"] > measured["zero1-dp2"] > measured["zero2-dp2"] > measured["zero3-dp2"]
    assert measured["tensor2"] < 0.65 * measured["zero1"]
    assert measured["pipeline2"] < 0.75 * measured["zero1"]
    assert measured["full"] < measured["zero1"]
    assert fast["zero1"].measured_host_bytes == 0
    assert fast["offload"].measured_host_bytes == pytest.approx(fast["offload"].formula["host_bytes"], rel=0.1)


def test_the_figures_are_written_whole(fast):
    written = json.loads(to_json(list(fast.values())))
    assert [row["layout"] for row in written] == FAST
    for row in written:
        assert sum(row["measured_parts"].values()) == row["measured_bytes"]
        assert row["ratio"] == pytest.approx(1.0, abs=0.1)


def test_a_layout_that_is_not_there_is_told():
    with pytest.raises(ConfigError, match="no layout is called zero9; there are zero0, "):
        measure("gpt2", ["zero9"])


def test_a_process_that_fails_ends_the_bench_with_what_it_said(tmp_path):
    with pytest.raises(MegaGPTError, match=r"(?s)exit codes \[1\] of 1 processes.*ValueError: int\(\) base"):
        run_group(int, 1, log=tmp_path / "log")  # of the rank, 0, to the base of their number, 1


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_layout_needs_what_the_formulas_say(family, dtype):
    check(measure(family, list(LAYOUTS), f"train.dtype={dtype}"))


@pytest.mark.parametrize("words", [[], ["parallel.pipeline_schedule=dualpipev"]], ids=["1f1b", "dualpipev"])
@pytest.mark.parametrize("stages", [2, 4])
def test_a_stage_holds_as_many_micro_batches_as_deepspeeds_schedule_has_in_flight(stages, words, tmp_path):
    from deepspeed.runtime.pipe import schedule

    is_v = bool(words)
    config = run_config(
        tmp_path, tmp_path, "model.n_layer=8", f"parallel.pipeline={stages}", "train.micro_batch_size=1", *words
    )
    plan = plan_batches(config, stages)
    for stage in range(stages):
        kind = schedule.DualPipeVSchedule if is_v else schedule.TrainSchedule
        alive, most = [0, 0], [0, 0]
        for commands in kind(plan.grad_accum_steps, stages, stage):
            for command in commands:
                part = getattr(command, "phase", 0)
                alive[part] += isinstance(command, schedule.ForwardPass) - isinstance(command, schedule.BackwardPass)
                most[part] = max(most[part], alive[part])
        assert in_flight(config, plan, stage) == tuple(most if is_v else most[:1])


def test_the_worst_stage_is_the_one_that_needs_most(tmp_path):
    words = ("model.n_layer=8", "parallel.pipeline=4", "train.micro_batch_size=1")
    config = run_config(tmp_path, tmp_path, *words, "model.max_seq_len=64")
    plan = plan_batches(config, 4)
    stage, estimate = worst_stage(config, plan)
    assert stage == 0  # most micro-batches in flight
    assert estimate.total_bytes > 0
    layers = [layer for stage in range(4) for part in memory_layout(config, plan, stage).parts for layer in part]
    assert layers == list(range(11))
    held = sum(held_parameters(config.model, memory_layout(config, plan, stage).parts[0]) for stage in range(4))
    assert held == held_parameters(config.model, range(11)) + 61 * 24  # the last stage's copy of a tied head
