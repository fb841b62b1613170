"""Activations on the host: the same numbers bit for bit, and nothing but weights stays on the device."""

import gc

import pytest
import torch

from megagpt.engine.accounting import TensorAccounting
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from megagpt.model.loss import next_token_nll
from megagpt.model.recompute import apply_recompute
from tests.model.test_memory import GPT2, LLAMA

CASES = [
    (config, kind)
    for config in (GPT2, GPT2.model_copy(update={"dropout": 0.3}), LLAMA)
    for kind in ("none", "selective", "full")
]


def loss_and_gradients(config, kind, *, offload, dtype=torch.float32):
    model = build_model(config)
    init_weights(model, 7)
    model = model.to(dtype)
    model.reset_buffers()
    apply_recompute(model, kind, offload=offload)
    tokens = torch.randint(config.vocab_size, (3, config.max_seq_len), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    gc.collect()
    with TensorAccounting(dict) as accounting:
        before = accounting.live_bytes
        loss = next_token_nll(model(tokens), tokens)
        kept = accounting.live_bytes - before
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), gradients, kept, accounting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "kind"), CASES)
def test_loss_and_gradients_are_bit_equal(config, kind, dtype):
    loss, gradients, _, _ = loss_and_gradients(config, kind, offload=False, dtype=dtype)
    other, others, _, accounting = loss_and_gradients(config, kind, offload=True, dtype=dtype)
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert accounting.peak_host_bytes > 0
    assert accounting.host_bytes == 0


@pytest.mark.parametrize(("config", "kind"), CASES)
def test_what_the_forward_keeps_moves_to_the_host(config, kind):
    _, _, kept, before = loss_and_gradients(config, kind, offload=False)
    _, _, left, after = loss_and_gradients(config, kind, offload=True)
    assert before.peak_host_bytes == 0
    assert left < kept
    # Gradients and the last block's output come and go: what the host has is what the device has less.
    assert after.peak_host_bytes == pytest.approx(kept - left, rel=0.1)


def test_choosing_again_replaces_what_was_chosen():
    model = build_model(GPT2)
    apply_recompute(model, "full", offload=True)
    apply_recompute(model, "none")
    assert not any("forward" in vars(module) for module in model.modules())
