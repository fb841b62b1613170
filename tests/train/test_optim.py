"""Matrices decay; norms, biases and learned positions do not."""

import pytest
import torch

from megagpt.engine.adamw import fused_adamw
from megagpt.model.build import build_model
from megagpt.train.optim import parameter_groups
from tests.tiny import run_config

DECAYED = {
    "gpt2": {
        "embedding.tokens.weight",
        *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention.qkv", "attention.output")),
        *(f"blocks.{i}.feed_forward.{name}.weight" for i in range(2) for name in ("up", "down")),
    },
    "llama": {
        "embedding.tokens.weight",
        "head.weight",
        *(f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attention.qkv", "attention.output")),
        *(f"blocks.{i}.feed_forward.{name}.weight" for i in range(2) for name in ("gate_up", "down")),
    },
}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_parameter_is_in_the_right_group_once(family, tmp_path):
    model = build_model(run_config(tmp_path, tmp_path / "t", family=family).model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == DECAYED[family]
    together = [names[id(p)] for p in decayed["params"] + others["params"]]
    assert sorted(together) == sorted(names.values())


def test_without_gradient_only_decayed_weights_shrink(tmp_path):
    """lr 0.5 and decay 0.1: an update with zero gradient multiplies by 1 - 0.05."""
    config = run_config(tmp_path, tmp_path / "t", "optim.lr=0.5", "optim.weight_decay=0.1")
    model = build_model(config.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = fused_adamw(parameter_groups(model, 0.1), config.optim, wherever_they_lie=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in DECAYED["gpt2"] else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
