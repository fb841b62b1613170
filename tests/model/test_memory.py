"""Memory formulas: the papers' examples, small cases by hand, and what autograd really keeps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megagpt.config.load import Section, load_config
from megagpt.config.schema import GPT2Model, LlamaModel, ModelSection
from megagpt.model.build import build_model
from megagpt.model.flops import parameter_count
from megagpt.model.memory import MemoryLayout, ZeroBuffers, block_elements, held_parameters, memory_bytes
from megagpt.model.recompute import apply_recompute

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"

LLAMA = LlamaModel(
    family="llama", n_layer=3, n_head=6, n_kv_head=2, d_model=48, d_ff=80, vocab_size=101, max_seq_len=64, qk_norm=True
)
GPT2 = GPT2Model(family="gpt2", n_layer=2, n_head=2, d_model=8, vocab_size=61, max_seq_len=16)


class OnlyModel(Section):
    model: ModelSection


def load(name: str):
    return load_config(OnlyModel, [CONFIGS / f"{name}.yaml"]).model


def layout(**changes):
    return MemoryLayout(**{"micro_batch_size": 4, "dtype": "fp32"} | changes)


def test_zero_memory_is_the_papers_example():
    # Rajbhandari et al. 2020, figure 1: 7.5B parameters, 64 devices, 2-byte gradients: 31.4, 16.6, 1.9 GB.
    config = GPT2Model(family="gpt2", n_layer=36, n_head=32, d_model=4096, vocab_size=51200, max_seq_len=1024)
    scale = 7.5e9 / parameter_count(config)
    for stage, gigabytes, bytes_of_a_gradient in ((1, 31.4, 6), (2, 16.6, 4), (3, 1.9, 4)):
        memory = memory_bytes(config, layout(dtype="bf16", zero_stage=stage, zero_parallel=64))
        theirs = memory.gradients_bytes * 2 / bytes_of_a_gradient
        states = memory.weights_bytes + theirs + memory.optimizer_bytes
        assert states * scale / 1e9 == pytest.approx(gigabytes, abs=0.06)


@pytest.mark.parametrize(
    ("stage", "dtype", "weights", "gradients", "optimizer"),
    [
        (0, "fp32", 4, 4, 8),
        (1, "fp32", 4, 4, 6),  # ZeRO makes a copy of its part of the weights, in fp32 too
        (1, "bf16", 2, 6, 6),
        (2, "bf16", 2, 2, 6),
        (3, "bf16", 1, 2, 6),
    ],
)
def test_bytes_a_parameter_on_two_processes(stage, dtype, weights, gradients, optimizer):
    P = parameter_count(GPT2)
    memory = memory_bytes(GPT2, layout(dtype=dtype, zero_stage=stage, zero_parallel=2))
    assert (memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes) == (
        weights * P,
        gradients * P,
        optimizer * P,
    )


def test_a_small_case_by_hand():
    """P = 61 x 8 + 16 x 8 + 2 x (12 x 64 + 13 x 8) + 16 = 2376; 64 tokens; 2 blocks of 16 x 8 elements."""
    memory = memory_bytes(GPT2, layout(zero_stage=0, fused=False))
    activations, logits = 64 * 4 * (2 * 16 * 8 + 2 * 8), 64 * 8 * 61
    assert memory.activations_bytes == activations
    assert memory.logits_bytes == logits
    assert memory.phase_bytes == {
        "loss": 12 * 2376 + activations + logits,
        "blocks": 12 * 2376 + activations + 4 * 61 * 8 + 64 * 4 * 9 * 8,
        "reduce": 20 * 2376,
        "update": 16 * 2376,
    }
    assert memory.total_bytes == max(memory.phase_bytes.values())
    again = memory_bytes(GPT2, layout(zero_stage=0, accumulation=2))
    assert again.phase_bytes["loss"] - memory.phase_bytes["loss"] == 4 * 2376


def test_buffers_of_zero_count():
    small = layout(dtype="bf16", zero_stage=2, zero_parallel=2, buffers=ZeroBuffers(reduce_bucket=1000))
    assert memory_bytes(GPT2, small).buffers_bytes == 2000
    overlapped = layout(
        dtype="bf16", zero_stage=2, zero_parallel=2, buffers=ZeroBuffers(reduce_bucket=1000, overlap=True)
    )
    assert memory_bytes(GPT2, overlapped).buffers_bytes == 4000
    assert memory_bytes(GPT2, layout(dtype="bf16", zero_stage=2, zero_parallel=2)).buffers_bytes == 1e9
    whole = memory_bytes(GPT2, layout(zero_stage=3, zero_parallel=2))
    assert whole.buffers_bytes == 4 * (500_000_000 + 2376)  # every weight is small enough to stay whole
    assert whole.gathered_bytes == 0
    cut = layout(zero_stage=3, zero_parallel=2, buffers=ZeroBuffers(persistent=100, reduce_bucket=0))
    small = 2 * (64 + 24 + 8 + 32 + 8 + 4 * 8) + 2 * 8  # of a block: the output's 8 x 8, biases, norms
    assert memory_bytes(GPT2, cut).buffers_bytes == 4 * small
    assert memory_bytes(GPT2, cut).gathered_bytes == 4 * (2376 - small)
    assert memory_bytes(GPT2, layout(zero_stage=3, zero_parallel=1)).gathered_bytes == 0


def test_activations_are_those_of_korthikanti_without_scores_and_masks():
    """Equations 1, 2 and 4: sbh (34 + 5as/h) bytes without parallelism, 10 + 24/t, 34/t; 2 bytes an element.

    Without scores (5as/h) and dropout masks (2 and 1 bytes; with 1/t where they lie inside) 32 is left, 8 + 24/t,
    and 28/t + 4: our regions keep the gathered input, where the paper gathers again in backward.
    """
    config = GPT2.model_copy(update={"n_head": 4})
    C = config.d_model
    assert 2 * block_elements(config, layout()) == 32 * C
    assert 2 * block_elements(config, layout(tensor=4)) == (8 + 24 / 4) * C
    assert 2 * block_elements(config, layout(tensor=4, tensor_sequence=True)) == (28 / 4 + 4) * C


def test_sequence_parallelism_divides_activations_and_logits():
    whole, cut = memory_bytes(GPT2, layout()), memory_bytes(GPT2, layout(sequence=2, zero_parallel=2))
    assert cut.activations_bytes == whole.activations_bytes / 2
    assert cut.logits_bytes == whole.logits_bytes / 2
    assert cut.optimizer_bytes == whole.optimizer_bytes / 2


def test_stages_hold_their_layers_and_copies_of_a_tied_head():
    block = 12 * 64 + 13 * 8
    assert held_parameters(GPT2, range(3)) == 61 * 8 + 16 * 8 + 2 * block
    assert held_parameters(GPT2, range(3, 5)) == 16 + 61 * 8
    assert held_parameters(GPT2, range(5)) == parameter_count(GPT2)
    # 61 rows over 2 processes: 32 each. Of a block, 12 C^2 + 7 C are cut and 6 C are whole.
    assert held_parameters(GPT2, range(5), 2) == 32 * 8 + 16 * 8 + 2 * ((12 * 64 + 56) // 2 + 48) + 16
    for changes in ({}, {"tied_head": True}, {"qk_norm": False}):
        config = LLAMA.model_copy(update=changes)
        assert held_parameters(config, range(6)) == parameter_count(config)


def test_a_pipeline_holds_activations_of_several_micro_batches():
    def kept(in_flight):
        stage = layout(parts=(range(2),), in_flight=(in_flight,))
        return memory_bytes(GPT2, stage).activations_bytes

    assert kept(3) - kept(2) == kept(2) - kept(1) == 64 * 4 * (16 * 8 + 8)


def test_recompute_and_offload_keep_less_on_the_device():
    def of(**changes):
        return memory_bytes(load("gpt2_124m"), layout(**changes))

    none, full = of(), of(recompute="full")
    assert of(recompute="selective").activations_bytes == none.activations_bytes
    tokens, C = 4 * 1024, 768
    assert full.activations_bytes == 4 * tokens * C * (12 + 16 + 2)
    offloaded, both = of(offload_activations=True), of(recompute="full", offload_activations=True)
    assert none.host_bytes == full.host_bytes == 0
    assert offloaded.host_bytes == 4 * tokens * C * 12 * 16
    assert both.host_bytes == 4 * tokens * C * 12
    assert both.total_bytes <= offloaded.total_bytes < none.total_bytes


def stored_bytes(config, recompute):
    """What autograd keeps in a forward, parameters and the rotary tables left out, each storage once."""
    model = build_model(config)
    apply_recompute(model, recompute)
    kept = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(torch.zeros(4, config.max_seq_len, dtype=torch.long))
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["llama_tiny", "gpt2_tiny"])
def test_stored_activations_are_what_autograd_keeps(name, recompute):
    config = load(name)
    unfused = layout(recompute=recompute, fused=False)
    estimate = memory_bytes(config, unfused).activations_bytes
    tokens = 4 * config.max_seq_len
    if recompute == "full":  # the block that backward is in does not live in the forward
        estimate -= 4 * tokens * block_elements(config, unfused)
    if name == "llama_tiny":
        estimate += 4 * tokens * config.d_model  # the final norm, step by step too
    assert stored_bytes(config, recompute) == pytest.approx(estimate, rel=0.03)


def test_formulas_need_no_torch():
    check = "import sys, megagpt.parallel.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=CONFIGS.parents[1], check=False).returncode == 0
