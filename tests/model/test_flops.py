"""Counts against published ones, FLOPs against the papers' formulas and against PyTorch itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config.load import Section, load_config
from megagpt.config.schema import LlamaModel, ModelSection
from megagpt.model.build import build_model
from megagpt.model.flops import (
    flops_per_token,
    hardware_flops_per_token,
    matmul_parameter_count,
    parameter_count,
    peak_tflops,
)
from megagpt.model.loss import next_token_nll
from megagpt.model.recompute import apply_recompute

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"

EXACT = {
    "gpt2_tiny": 1024 * 64 + 128 * 64 + 4 * (12 * 64 * 64 + 13 * 64) + 2 * 64,
    "gpt2_124m": 124_439_808,
    "gpt2_355m": 354_823_168,
    "gpt2_774m": 774_030_080,
    "gpt2_1558m": 1_557_611_200,
    "llama_tiny": 2 * 1024 * 64 + 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192 + 2 * 64) + 64,
    "llama_1b": 1_235_814_400,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_70b": 68_976_648_192,
}
ROUNDED = {"gpt3_6b7": 6.7e9, "gpt3_13b": 13.0e9, "gpt3_175b": 175.0e9}

SMALL_LLAMA = LlamaModel(
    family="llama", n_layer=3, n_head=6, n_kv_head=2, d_model=48, d_ff=80, vocab_size=101, max_seq_len=64, qk_norm=True
)


class OnlyModel(Section):
    model: ModelSection


def load(name: str):
    return load_config(OnlyModel, [CONFIGS / f"{name}.yaml"]).model


def test_every_model_file_has_a_published_count():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == EXACT.keys() | ROUNDED.keys()


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_formula_equals_the_built_model_and_the_files_comment(name):
    with torch.device("meta"):
        model = build_model(load(name))
    count = parameter_count(load(name))
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert f"{count:,}" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize(("name", "published"), EXACT.items())
def test_count_is_the_published_one(name, published):
    assert parameter_count(load(name)) == published


@pytest.mark.parametrize(("name", "published"), ROUNDED.items())
def test_gpt3_count_is_the_papers_within_its_rounding_of_sizes(name, published):
    assert parameter_count(load(name)) == pytest.approx(published, rel=0.012)


def test_formula_counts_untied_heads_and_qk_norms():
    for change in ({}, {"tied_head": True}, {"qk_norm": False}, {"n_kv_head": 6}):
        config = SMALL_LLAMA.model_copy(update=change)
        model = build_model(config)
        assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def test_matmul_parameters_are_the_linear_maps():
    for config in (SMALL_LLAMA, load("gpt2_tiny")):
        linear = [module for module in build_model(config).modules() if isinstance(module, torch.nn.Linear)]
        assert matmul_parameter_count(config) == sum(module.weight.numel() for module in linear)


def test_flops_are_those_of_korthikanti_and_narayanan():
    config = load("gpt3_175b")
    layers, h, s, vocab = 96, 12288, 2048, 50257
    model = 72 * layers * h * h * (1 + s / (6 * h) + vocab / (12 * layers * h))
    recomputed = 96 * layers * h * h * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert flops_per_token(config, s) == pytest.approx(model, rel=1e-12)
    assert hardware_flops_per_token(config, s, "none") == flops_per_token(config, s)
    assert hardware_flops_per_token(config, s, "full") == pytest.approx(recomputed, rel=1e-12)


def test_causal_flops_leave_out_half_of_the_attention():
    config = load("gpt2_124m")
    full, causal = flops_per_token(config, 1024), flops_per_token(config, 1024, "causal")
    assert full - causal == 6 * 12 * 768 * 1024
    assert hardware_flops_per_token(config, 1024, "selective") - full == 4 * 12 * 768 * 1024


@pytest.mark.parametrize("config", [SMALL_LLAMA, load("gpt2_tiny")], ids=["llama", "gpt2"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_flops_are_what_pytorch_counts(config, recompute):
    seq_len = 32
    model = build_model(config)
    apply_recompute(model, recompute)
    tokens = torch.zeros(2, seq_len, dtype=torch.long)
    # The math kernel's products are counted one by one and in full, mask or not.
    math_kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with math_kernel, set_checkpoint_early_stop(False), FlopCounterMode(display=False) as counter:
        next_token_nll(model(tokens), tokens).backward()
    expected = hardware_flops_per_token(config, seq_len, recompute) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD EPYC 7763", None),
    ],
)
def test_peak_is_found_by_the_words_of_the_devices_name(device, peak):
    assert peak_tflops(device) == peak


def test_formulas_need_no_torch():
    check = "import sys, megagpt.model.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=CONFIGS.parents[1], check=False).returncode == 0


def test_each_comment_names_a_source():
    for path in CONFIGS.glob("*.yaml"):
        comment = "".join(re.findall(r"^#.*", path.read_text(), re.MULTILINE))
        assert "Source:" in comment or "For tests" in comment
