"""`megagpt verify` says that a right engine is right, and names what a broken one does wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megagpt.verify.run import Request, verify
from megagpt.verify.show import show
from tests.tiny import run_config, run_words
from tests.verify import started

ROOT = Path(__file__).resolve().parents[2]
REQUEST = Request(steps=2, processes=2, world_size=None, seconds=240.0)
SEQUENCE = ("parallel.tensor=2", "parallel.tensor_sequence=true")
PIPELINE = ("parallel.pipeline=2", "model.tied_head=true")


def verdict_of(tmp_path, *words, family="llama", request=REQUEST, fault=None):
    """Of the tiny run of the tests, in processes of the tests' fork server."""
    config = run_config(tmp_path / "run", tmp_path / "tokens", "train.global_batch_size=16", *words, family=family)
    said = []
    verdict = verify(config, request, started.starting(fault), said.append)
    assert said
    assert not (tmp_path / "run").exists()
    return verdict


def shown(verdict):
    out = io.StringIO()
    show(verdict, Console(file=out, width=160))
    return out.getvalue()


def differing(verdict):
    """What differs -> the first that does."""
    return {
        f"{finding.run} {finding.what.partition(',')[0]}": finding.first
        for finding in verdict.findings
        if not finding.ok
    }


def test_the_command_proves_a_right_layout(tmp_path):
    """The command itself: its own processes, exit code and JSON."""
    words = run_words(tmp_path / "run", tmp_path / "tokens", *SEQUENCE, "parallel.zero_stage=3", "train.dtype=bf16")
    command = [sys.executable, "-c", "from megagpt.cli import main; main()", "verify", "--processes", "2", "--json"]
    found = subprocess.run([*command, "--steps", "2", *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    told = json.loads(found.stdout)
    assert told["ok"] is True
    assert (told["processes"], told["parallel"]["tensor"], told["parallel"]["zero_stage"]) == (2, 2, 3)
    assert [finding["run"] for finding in told["findings"]] == ["fp32"] * 7 + ["bf16"] * 3
    assert all(finding["ok"] for finding in told["findings"])
    assert "plain PyTorch, fp32: step 2 of 2" in found.stderr
    assert "starting 2 processes" in found.stderr
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_added_up_is_found_and_its_tensor_named(tmp_path):
    verdict = verdict_of(tmp_path, *SEQUENCE, fault=started.no_sum_over_the_tensor_group)
    assert not verdict.ok
    found = differing(verdict)
    assert found["fp32 first moments after step 1"] == "blocks.0.attention_norm.weight"
    assert found["fp32 gradient norm of 2 steps"] == "step 1"
    text = shown(verdict)
    assert text.count("✗") == len(found)
    assert "✓ │ fp32      │ initial weights" in text
    assert "error: fp32: first moments after step 1, 15 tensors: first: blocks.0.attention_norm.weight" in text


def test_a_process_that_fails_is_told_with_its_reason_and_the_others_are_ended(tmp_path):
    verdict = verdict_of(tmp_path, fault=started.one_process_ends)
    assert differing(verdict) == {"fp32 2 processes train": "process 1: OSError: no memory is left"}
    assert any("OSError: no memory is left" in line for line in verdict.log)
    assert "no memory is left" in shown(verdict)
    assert json.loads(verdict.to_json())["ok"] is False


FAULTS = {
    started.decay_everything: ((), "fp32 weights after step 1", "blocks.0.attention_norm.weight"),
    started.initial_weights_by_rank: (("parallel.tensor=2",), "fp32 initial weights", "embedding.tokens.weight"),
    started.next_steps_samples: ((), "fp32 samples and their order", "step 1"),
    started.tied_gradients_apart: (PIPELINE, "fp32 first moments after step 1", "embedding.tokens.weight"),
    started.clipping_left_out: ((), "fp32 first moments after step 1", "embedding.tokens.weight"),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_other_fault_is_found(fault, tmp_path):
    words, what, first = FAULTS[fault]
    assert differing(verdict_of(tmp_path, *words, fault=fault))[what] == first


@pytest.mark.exhaustive
def test_processes_that_hang_are_ended(tmp_path):
    verdict = verdict_of(tmp_path, request=replace(REQUEST, seconds=5.0), fault=started.one_process_hangs)
    (told,) = differing(verdict).values()
    assert told.startswith("they did not end within 5 s")


LAYOUTS = {
    "zero0": ("gpt2", 2, "parallel.zero_stage=0"),
    "zero2": ("gpt2", 2, "parallel.zero_stage=2", "train.dtype=bf16", "train.recompute=selective", "model.dropout=0.1"),
    "zero3": ("llama", 2, "parallel.zero_stage=3", "train.dtype=bf16", "train.recompute=full"),
    "tensor": ("gpt2", 4, "parallel.tensor=2", "parallel.zero_stage=2", "train.dtype=bf16", "model.n_head=2"),
    "mqa": ("llama", 4, "parallel.tensor=4", "model.n_kv_head=1", "model.d_model=32", "model.qk_norm=true"),
    "pipeline": ("llama", 4, *PIPELINE, "train.dtype=bf16", "model.n_layer=3"),
    "dualpipev": ("gpt2", 4, "parallel.pipeline=2", "parallel.pipeline_schedule=dualpipev", "model.n_layer=4",
                  "train.dtype=bf16"),
    "all": ("gpt2", 8, *SEQUENCE, "parallel.pipeline=2", "train.dtype=bf16"),
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_layout_is_proved(layout, tmp_path):
    family, processes, *words = LAYOUTS[layout]
    request = replace(REQUEST, steps=5, processes=processes)
    verdict = verdict_of(tmp_path, *words, family=family, request=request)
    assert verdict.ok, shown(verdict)
    assert verdict.small.world_size == processes
    assert "all agrees" in shown(verdict)
