"""Compiled blocks: the same names, losses and gradients, one graph for all; a message without a compiler."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder, exc

from megagpt.config.schema import GPT2Model
from megagpt.errors import ConfigError
from megagpt.model.build import build_model
from megagpt.model.compile import compile_blocks
from megagpt.model.init import init_weights
from megagpt.model.recompute import apply_recompute

CONFIG = GPT2Model(family="gpt2", n_layer=10, n_head=2, d_model=24, vocab_size=61, max_seq_len=16)
TOKENS = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(*, compiled, recompute="none"):
    model = build_model(CONFIG)
    init_weights(model, 1)
    if compiled:
        compile_blocks(model)
    apply_recompute(model, recompute)
    loss = model.nll(model(TOKENS[:, :-1]), TOKENS[:, 1:])
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # a compiler's own warnings are not ours
def test_compiled_blocks_compute_the_same_in_one_graph():
    expected_loss, expected = loss_and_gradients(compiled=False)
    torch._dynamo.reset()
    counters.clear()
    for recompute in ("none", "full"):
        loss, found = loss_and_gradients(compiled=True, recompute=recompute)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        assert list(found) == list(expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_without_a_compiler_the_message_names_it_and_the_key(monkeypatch):
    def nothing_found(*_):
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", nothing_found)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler .*install g\+\+ .*train.compile=false"):
        compile_blocks(build_model(CONFIG))
