"""A refused step leaves nothing behind: under every optimizer of DeepSpeed's the run goes on as if it had not been."""

from __future__ import annotations

import json
import math

import pytest

from tests.distributed.processes import start
from tests.distributed.refusal_jobs import REFUSED, STEPS, refuse_in_each
from tests.tiny import run_config

FAST = {
    "zero0": ["parallel.zero_stage=0"],
    "bf16-zero1": ["parallel.zero_stage=1", "train.dtype=bf16"],
    "zero2": ["parallel.zero_stage=2"],
    "zero3": ["parallel.zero_stage=3"],
}
REST = {
    "zero1": ["parallel.zero_stage=1"],
    "bf16-zero2": ["parallel.zero_stage=2", "train.dtype=bf16"],
    "bf16-zero3": ["parallel.zero_stage=3", "train.dtype=bf16"],
    "fp16-zero1": ["parallel.zero_stage=1", "train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 8}}"],
    "fp16-zero3": ["parallel.zero_stage=3", "train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 8}}"],
    "offload-zero1": ["parallel.zero_stage=1", "parallel.offload_optimizer=cpu"],
    "offload-zero2": ["parallel.zero_stage=2", "parallel.offload_optimizer=cpu"],
    "offload-bf16-zero2": ["parallel.zero_stage=2", "parallel.offload_optimizer=cpu", "train.dtype=bf16"],
    "offload-zero3": ["parallel.zero_stage=3", "parallel.offload_optimizer=cpu"],
    "muon-zero0": ["parallel.zero_stage=0", "optim.name=muon"],
    "muon-bf16-zero1": ["parallel.zero_stage=1", "optim.name=muon", "train.dtype=bf16"],
}
LAID_OUT = {
    "tp2": ["parallel.tensor=2", "parallel.zero_stage=0"],
    "tp2-bf16": ["parallel.tensor=2", "train.dtype=bf16"],
    "pp2": ["parallel.pipeline=2"],
    "pp2-bf16": ["parallel.pipeline=2", "train.dtype=bf16"],
    "sp2": ["parallel.sequence=2", "parallel.zero_stage=2"],
}


def refusals(layouts, tokens, tmp_path):
    configs = {name: run_config(tmp_path / "unused", tokens, *words) for name, words in layouts.items()}
    start(refuse_in_each, 2, configs, tmp_path / "out.json", log=tmp_path / "log").finish()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found.keys() == layouts.keys()
    for name, told in found.items():
        assert told["skipped"] == [batch == REFUSED for batch in range(STEPS)], name
        assert all(math.isfinite(norm) and norm > 0 for norm in told["norms"]), (name, told)
        assert told["values"] > 20, name
    return {name for name, told in found.items() if not told["same"]}


def test_a_refused_step_leaves_nothing_behind(tokens, tmp_path):
    assert refusals(FAST, tokens, tmp_path) == set()


@pytest.mark.exhaustive
def test_a_refused_step_leaves_nothing_behind_with_other_optimizers(tokens, tmp_path):
    assert refusals(REST, tokens, tmp_path) == set()


@pytest.mark.exhaustive
@pytest.mark.parametrize("degrees", ["tp2", "pp2", "sp2"])
def test_a_refused_step_leaves_nothing_behind_in_a_layout(degrees, tokens, tmp_path):
    layouts = {name: words for name, words in LAID_OUT.items() if name.startswith(degrees)}
    assert refusals(layouts, tokens, tmp_path) == set()
