"""The comparison of loops: they do the same work, the figures are what was measured, and what cannot be is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from click.testing import CliRunner

from megagpt.bench.compare import BenchRequest, Comparison, Measured, Worker, check_comparable, summary
from megagpt.bench.litgpt import LitLoop, chunked_loss
from megagpt.bench.loop import Loop
from megagpt.bench.nanogpt import NanoLoop
from megagpt.bench.ours import PlainLoop
from megagpt.cli import main
from megagpt.errors import ConfigError, MegaGPTError
from megagpt.model.flops import parameter_count
from megagpt.train.environment import name_process, put_environment_first
from tests.tiny import VOCAB_SIZE, run_config, run_words

CASES = [(PlainLoop, "gpt2"), (PlainLoop, "llama"), (NanoLoop, "gpt2"), (LitLoop, "gpt2"), (LitLoop, "llama")]


def windows(n_micro_batches=2, rows=2, seq_len=16):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB_SIZE, (rows, seq_len + 1), generator=generator) for _ in range(n_micro_batches)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("make", "family"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_loop_learns_the_batch_that_it_is_shown(make, family, dtype, tmp_path):
    config = run_config(tmp_path, tmp_path, f"train.dtype={dtype}", family=family)
    loop: Loop = make(config, "cpu")
    data = windows()
    first = float(loop.step(data))
    assert first == pytest.approx(torch.log(torch.tensor(VOCAB_SIZE)).item(), abs=0.3)
    for _ in range(60):
        last = float(loop.step(data))
    assert last < 0.5 * first


@pytest.mark.parametrize("make", [PlainLoop, LitLoop])
def test_micro_batches_add_up(make, tmp_path):
    config = run_config(tmp_path, tmp_path, "train.dtype=fp32")
    data = windows(n_micro_batches=4, rows=1)
    parts, whole = make(config, "cpu"), make(config, "cpu")
    for _ in range(4):
        assert float(parts.step(data)) == pytest.approx(float(whole.step([torch.cat(data)])), rel=1e-5)


@pytest.mark.parametrize(("make", "name"), [(NanoLoop, "gpt2"), (LitLoop, "llama")])
def test_a_peer_has_as_many_parameters_as_ours(make, name, tmp_path):
    config = run_config(tmp_path, tmp_path, family=name)
    found = sum(parameter.numel() for parameter in make(config, "cpu")._parameters)
    model = config.model
    biases = model.n_layer * 11 * model.d_model + model.d_model if name == "gpt2" else 0  # nanoGPT leaves them out
    assert found == parameter_count(model) - biases


def test_the_chunked_loss_is_the_mean_over_the_targets_that_count():
    logits, targets = torch.randn(3, 100, 7), torch.randint(7, (3, 100))
    targets[1, 20:] = -100
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(chunked_loss(logits, targets), expected)


@pytest.mark.slow
def test_the_command_measures_ours_and_plain_at_the_same_loss(tmp_path):
    out = tmp_path / "speed.json"
    words = run_words(tmp_path, tmp_path, "train.dtype=bf16", "log.peak_tflops=1")
    options = ["--against", "plain", "--rounds", "2", "--steps", "2", "--warmup", "1", "--threads", "1"]
    found = CliRunner().invoke(main, ["bench", "train", *options, "--json", str(out), *words], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    figures = json.loads(out.read_text())
    ours, plain = figures["loops"]["ours"], figures["loops"]["plain"]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert len(ours["step_seconds"]) == 2
    assert min(ours["peak_bytes"], plain["peak_bytes"]) > 50 * 2**20
    assert ours["mfu_full"] > ours["mfu_causal"] > 0
    assert "plain has" in found.output


def test_a_loop_that_fails_says_why(tmp_path):
    config = run_config(tmp_path, tmp_path, "train.dtype=fp32", "parallel.extra={no_such_key: 1}")
    environment = dict(os.environ)
    put_environment_first(environment)
    name_process(environment)
    with Worker("ours", environment) as worker, pytest.raises(MegaGPTError, match=r"ours: .*no_such_key"):
        worker.build(BenchRequest(config))


REFUSED = [
    ("gpt2", ["parallel.tensor=2"], ("plain",), "parallel.tensor, pipeline and sequence to 1"),
    ("gpt2", ["train.dtype=fp16"], ("plain",), "use bf16 or fp32"),
    ("gpt2", ["model.dropout=0.1"], ("plain",), "model.dropout is 0.1"),
    ("llama", [], ("nanogpt",), "GPT-2's shape only"),
    ("gpt2", ["train.recompute=full"], ("plain", "litgpt"), "train.recompute is full, which litgpt lacks"),
    ("gpt2", [], ("megatron",), "--against megatron: not known; choose among plain, nanogpt, litgpt"),
]


@pytest.mark.parametrize(("family", "overrides", "against", "message"), REFUSED)
def test_what_the_loops_would_not_do_alike_is_refused(family, overrides, against, message, tmp_path):
    config = run_config(tmp_path, tmp_path, *overrides, family=family)
    with pytest.raises(ConfigError, match=message):
        check_comparable(BenchRequest(config, against))


def test_ratios_are_taken_round_by_round(tmp_path):
    """A round in which the machine was three times slower does not move them."""
    ours = Measured("ours", step_seconds=[1.0, 3.0, 1.0], step_cpu_seconds=[1.0, 1.0, 1.0])
    plain = Measured("plain", step_seconds=[0.96, 2.88, 0.96], step_cpu_seconds=[0.5, 0.5, 0.5])
    nano = Measured("nanogpt", step_seconds=[0.9, 9.0, 0.9], step_cpu_seconds=[1.0, 1.0, 1.0])
    request = BenchRequest(run_config(tmp_path, tmp_path))
    found = Comparison(request, "cpu", 1, 2.0, None, (ours, plain, nano))
    assert found.speed(plain) == pytest.approx(1 / 0.96)
    assert found.speed(plain, cpu=True) == 2.0
    assert found.tokens_per_second(ours) == 8 * 16
    assert found.utilization(ours, "full", 2.0) > found.utilization(ours, "causal", 2.0)
    lines = summary(found)
    assert lines[0].endswith("1.05: kept")
    assert lines[1].endswith("1.00: NOT KEPT")
