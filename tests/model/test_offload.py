"""Activations on the host: the same numbers bit for bit, and nothing but weights stays on the device."""

import gc
from functools import cache
from itertools import product

import pytest
import torch

from megagpt.engine.accounting import TensorAccounting
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from megagpt.model.loss import next_token_nll
from megagpt.model.recompute import apply_recompute
from tests.model.test_memory import GPT2, LLAMA

CONFIGS = {"gpt2": GPT2, "gpt2 with dropout": GPT2.model_copy(update={"dropout": 0.3}), "llama": LLAMA}
CASES = list(product(CONFIGS, ("none", "selective", "full")))
IN_BF16 = [("gpt2", "full"), ("gpt2 with dropout", "selective"), ("llama", "none")]


@cache
def measured(name, kind, *, offload, dtype=torch.float32):
    """Loss, gradients, bytes that the forward keeps on the device, most bytes on the host, and those in the end."""
    config = CONFIGS[name]
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
    return loss.detach(), gradients, kept, accounting.peak_host_bytes, accounting.host_bytes


def check_bit_equal(name, kind, dtype):
    loss, gradients, *_ = measured(name, kind, offload=False, dtype=dtype)
    other, others, _, most_on_host, on_host = measured(name, kind, offload=True, dtype=dtype)
    assert torch.equal(loss, other)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())
    assert most_on_host > 0
    assert on_host == 0


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_loss_and_gradients_are_bit_equal(name, kind):
    check_bit_equal(name, kind, torch.float32)


@pytest.mark.parametrize(("name", "kind"), IN_BF16)
def test_loss_and_gradients_are_bit_equal_in_bf16(name, kind):
    check_bit_equal(name, kind, torch.bfloat16)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case not in IN_BF16])
def test_loss_and_gradients_are_bit_equal_in_bf16_in_all_other_cases(name, kind):
    check_bit_equal(name, kind, torch.bfloat16)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_the_forward_keeps_moves_to_the_host(name, kind):
    _, _, kept, most_before, _ = measured(name, kind, offload=False)
    _, _, left, most_after, _ = measured(name, kind, offload=True)
    assert most_before == 0
    assert left < kept
    # Gradients and the last block's output come and go: what the host has is what the device has less.
    assert most_after == pytest.approx(kept - left, rel=0.1)


def test_choosing_again_replaces_what_was_chosen():
    model = build_model(GPT2)
    apply_recompute(model, "full", offload=True)
    apply_recompute(model, "none")
    assert not any("forward" in vars(module) for module in model.modules())
