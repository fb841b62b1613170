"""Initial weights depend on seed, name and shape alone."""

import math

import pytest
import torch
from torch import nn

from megagpt.config.schema import GPT2Model, LlamaModel
from megagpt.model.build import build_model
from megagpt.model.init import INIT_RULES, InitRule, init_weights, initial_value, rule_for

GPT2 = GPT2Model(family="gpt2", n_layer=3, n_head=4, d_model=64, vocab_size=301, max_seq_len=96)
LLAMA = LlamaModel(
    family="llama", n_layer=3, n_head=4, n_kv_head=2, d_model=64, d_ff=96, vocab_size=301, max_seq_len=96, qk_norm=True
)
FAMILIES = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def initialised(config, seed=7):
    model = build_model(config)
    init_weights(model, seed)
    return model


@FAMILIES
def test_a_model_from_the_meta_device_starts_with_the_same_weights_and_tables(config):
    expected = initialised(config)
    torch.manual_seed(99)
    with torch.device("meta"):
        model = build_model(config)
    model = model.to_empty(device="cpu")
    init_weights(model, 7)
    state = model.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name
    for (name, buffer), (_, value) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, value), name


@FAMILIES
def test_a_parameter_alone_has_the_value_it_has_in_the_model(config):
    names = dict(initialised(config).named_parameters())
    for name, parameter in reversed(names.items()):
        alone = initial_value(name, tuple(parameter.shape), 7, rule_for(name, config.n_layer))
        assert torch.equal(alone, parameter), name


def test_values_are_the_same_on_every_machine():
    value = initial_value("blocks.0.attention.qkv.weight", (4, 8), 1234, InitRule(std=0.02))
    torch.testing.assert_close(value[0, :3], torch.tensor(PINNED), rtol=1e-5, atol=0)


PINNED = [0.02380446530878544, 0.014486509375274181, -0.012672245502471924]


def test_seed_and_name_both_count():
    rule = InitRule(std=1.0)
    values = [initial_value(name, (1000,), seed, rule) for name in ("a", "b") for seed in (1, 2)]
    for i, first in enumerate(values):
        for second in values[:i]:
            assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.15


def test_gpt2_statistics_are_those_of_the_paper():
    model = initialised(GPT2.model_copy(update={"vocab_size": 2000, "d_model": 128}))
    stds = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    residual = 0.02 / math.sqrt(2 * 3)
    assert stds["embedding.tokens.weight"] == pytest.approx(0.02, rel=0.02)
    assert stds["embedding.positions.weight"] == pytest.approx(0.01, rel=0.03)
    assert stds["blocks.1.attention.qkv.weight"] == pytest.approx(0.02, rel=0.02)
    assert stds["blocks.1.attention.output.weight"] == pytest.approx(residual, rel=0.03)
    assert stds["blocks.2.feed_forward.down.weight"] == pytest.approx(residual, rel=0.02)
    assert all(abs(parameter.mean()) < 1e-3 for parameter in model.parameters() if parameter.dim() > 1)


@FAMILIES
def test_norms_start_at_one_and_biases_at_zero(config):
    for name, parameter in initialised(config).named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith(".bias") else 1.0)), name


@FAMILIES
def test_the_head_is_tied_also_after_leaving_the_meta_device(config):
    config = config if config.family == "gpt2" else config.model_copy(update={"tied_head": True})
    with torch.device("meta"):
        model = build_model(config)
    model = model.to_empty(device="cpu")
    init_weights(model, 1)
    assert model.head.weight is model.embedding.tokens.weight
    assert model.bfloat16().head.weight is model.embedding.tokens.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_rotary_tables_survive_a_change_of_type_and_back():
    model = initialised(LLAMA)
    expected = model.blocks[0].attention.rotary.cos.clone()
    model.bfloat16().float().reset_buffers()
    assert torch.equal(model.blocks[2].attention.rotary.cos, expected)


def test_an_uncovered_parameter_is_an_error():
    model = build_model(GPT2)
    model.surprise = nn.Parameter(torch.zeros(3))
    with pytest.raises(LookupError, match="no initial value is defined for parameter 'surprise'"):
        init_weights(model, 1)


def test_initialising_on_the_meta_device_is_an_error():
    with torch.device("meta"):
        model = build_model(GPT2)
    with pytest.raises(ValueError, match=r"on the meta device; call model\.to_empty"):
        init_weights(model, 1)


def test_every_rule_is_used():
    untied = [*build_model(GPT2).named_parameters(), *build_model(LLAMA).named_parameters()]
    used = {rule_for(name, 3) for name, _ in untied}
    scaled = {InitRule(std=r.std / math.sqrt(6)) if r.residual else r for r in INIT_RULES.values()}
    assert used == scaled
