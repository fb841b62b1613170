"""What `--check` says about memory."""

from __future__ import annotations

import re

import pytest

from megagpt.model.flops import parameter_count
from megagpt.parallel.memory import recompute_memory
from megagpt.parallel.plan import plan_batches
from megagpt.train.describe import check_run, describe_plan, plan_as_text
from tests.tiny import run_config, write_tokens

LARGE = (
    "model.n_layer=24",
    "model.d_model=1024",
    "model.n_head=16",
    "train.dtype=bf16",
    "model.max_seq_len=1024",
    "train.micro_batch_size=8",
    "train.global_batch_size=32",
)


def test_check_tells_what_each_recomputation_saves(tmp_path):
    config = run_config(tmp_path / "run", write_tokens(tmp_path / "tokens", 1000), *LARGE)
    text = check_run(config, 2)
    found = dict(re.findall(r"with (\S.*?): [\d,]+ MiB, saves ([\d,]+) MiB", text))
    saved = {words: int(size.replace(",", "")) for words, size in found.items()}
    assert saved["recompute=none"] == saved["recompute=selective"] == 0
    assert 0 < saved["recompute=full"] <= saved["recompute=full, offload_activations=true"]
    assert saved["recompute=none, offload_activations=true"] > 0
    assert "recompute=none, offload_activations=true: " in text
    assert " MiB on the host" in text


def test_the_plan_holds_the_formulas_of_the_worst_stage(tmp_path):
    words = (*LARGE, "parallel.pipeline=2")
    config = run_config(tmp_path / "run", write_tokens(tmp_path / "tokens", 1000), *words)
    plan = plan_batches(config, 2)
    described = describe_plan(config, plan)
    assert described["memory_stage"] in (0, 1)
    assert f"a process of stage {described['memory_stage']}, which needs most" in plan_as_text(described)
    first, last = described["stages"]
    assert first["layers"].startswith("embedding, blocks 0-")
    assert last["layers"].endswith(f"-{config.model.n_layer - 1}, final norm, head")
    assert first["flops"] + last["flops"] == pytest.approx(1.0)
    assert f"stage 0    {first['layers']}: {first['flops']:.1%} of the FLOPs" in plan_as_text(described)
    total = described["memory_bytes"]["total_bytes"]
    assert total == max(described["memory_bytes"]["phase_bytes"].values())
    assert recompute_memory(config, plan)["recompute=none"].total_bytes == total


def test_check_tells_what_a_checkpoint_takes(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", 1000)

    def told(world_size, *words):
        config = run_config(tmp_path / "run", tokens, *LARGE, *words)
        described = describe_plan(config, plan_batches(config, world_size))
        return described["checkpoint_bytes"], described["checkpoint_host_bytes"]

    whole = 12 * parameter_count(run_config(tmp_path / "run", tokens, *LARGE).model)
    fp32 = ("train.dtype=fp32", "parallel.zero_stage=0")
    assert told(1) == told(2, *fp32) == (whole, whole)
    assert told(2) == told(2, "parallel.zero_stage=3") == (whole, whole // 2)
    assert told(2, "checkpoint.asynchronous=false") == (whole, 0)
    assert told(1, "optim.name=muon")[0] < whole
    for words in ("parallel.tensor=2", "parallel.pipeline=2"):
        size, part = told(2, words)
        assert size == whole
        assert whole / 2 <= part < 0.6 * whole
    config = run_config(tmp_path / "run", tokens, *LARGE)
    assert f"checkpoint {whole / 2**20:,.0f} MiB on disk, and {whole / 2**20:,.0f} MiB of host memory" in check_run(
        config, 1
    )
