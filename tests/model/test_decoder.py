"""The layer list, the loss, recompute, and the rules that the model code keeps."""

import ast
import copy
import math
from pathlib import Path

import pytest
import torch

from megagpt.config.schema import GPT2Model, LlamaModel
from megagpt.model.build import FAMILIES, build_model
from megagpt.model.init import init_weights
from megagpt.model.loss import IGNORED_TARGET, count_targets, next_token_nll
from megagpt.model.recompute import apply_recompute

MODEL_CODE = Path(__file__).resolve().parents[2] / "megagpt" / "model"

GPT2 = GPT2Model(family="gpt2", n_layer=2, n_head=3, d_model=24, vocab_size=53, max_seq_len=20)
DROPPING = GPT2.model_copy(update={"dropout": 0.2})
LLAMA = LlamaModel(
    family="llama", n_layer=2, n_head=4, n_kv_head=2, d_model=24, d_ff=37, vocab_size=53, max_seq_len=20, qk_norm=True
)
FAMILY_CONFIGS = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def model_and_tokens(config):
    model = build_model(config)
    init_weights(model, 3)
    tokens = torch.randint(config.vocab_size, (2, 13), generator=torch.Generator().manual_seed(0))
    return model, tokens


def test_every_family_of_the_schema_can_be_built():
    assert FAMILIES.keys() == {"gpt2", "llama"}


@FAMILY_CONFIGS
def test_forward_is_the_loop_over_the_layers(config):
    model, tokens = model_and_tokens(config)
    assert [name for name, _ in model.layers()] == ["embedding", "blocks.0", "blocks.1", "final_norm", "head"]
    x = tokens
    for name, layer in model.layers():
        assert model.get_submodule(name) is layer
        x = layer(x)
    assert x.shape == (2, 13, 53)
    assert torch.equal(model(tokens), x)
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 13, 24)
    assert torch.equal(model.head(hidden), x)
    assert torch.allclose(model.head(hidden[0, 5]), x[0, 5], atol=1e-6)


@FAMILY_CONFIGS
def test_no_token_sees_a_later_one(config):
    model, tokens = model_and_tokens(config)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 53
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9], after[:, 9])


@FAMILY_CONFIGS
def test_cached_logits_equal_uncached_ones_for_ragged_rows(config):
    model, tokens = model_and_tokens(config)
    expected = model(tokens)
    cache = model.new_cache(2, 20)
    chunks = [[5, 2], [3, 3], [1, 1], [1, 2], [2, 1]]  # tokens each row takes, pass by pass
    taken = [0, 0]
    for counts in chunks:
        block = torch.full((2, max(counts)), 7)
        for row, count in enumerate(counts):
            block[row, :count] = tokens[row, taken[row] : taken[row] + count]
        taken = [before + count for before, count in zip(taken, counts, strict=True)]
        logits = model.decode(block, cache, counts)
        for row, end in enumerate(taken):
            torch.testing.assert_close(logits[row], expected[row, end - 1], rtol=0, atol=2e-6)
    assert cache.lengths == [12, 9]


@FAMILY_CONFIGS
def test_every_position_from_the_cache_equals_forward(config):
    model, tokens = model_and_tokens(config)
    n_vocab = model.sizes.vocab_size
    cache = model.new_cache(2, 13)
    found = []
    for part in tokens.split([4, 1, 8], dim=1):
        positions = torch.arange(part.numel()).repeat_interleave(n_vocab)
        every_token = torch.arange(n_vocab).repeat(part.numel())
        scores, _ = model.score(part, cache, [part.shape[1]] * 2, positions, every_token)
        found.append(scores.view(*part.shape, n_vocab))
    torch.testing.assert_close(torch.cat(found, dim=1), model(tokens).log_softmax(-1), rtol=0, atol=2e-6)


def test_a_full_cache_says_so():
    model, tokens = model_and_tokens(GPT2)
    with pytest.raises(ValueError, match="cache of 8 tokens cannot take 13"):
        model.decode(tokens, model.new_cache(2, 8), [13, 13])


def test_loss_is_the_sum_of_negative_log_probabilities_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [5.0, 5.0]]])
    targets = torch.tensor([[1, 1, IGNORED_TARGET]])
    # p = 3/4, then 1/5, then not counted
    assert next_token_nll(logits, targets).item() == pytest.approx(-math.log(0.75) - math.log(0.2), rel=1e-6)
    assert count_targets(targets).item() == 2


def test_loss_is_fp32_for_half_precision_and_zero_without_targets():
    logits = torch.randn(2, 3, 11, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.full((2, 3), IGNORED_TARGET)
    loss = next_token_nll(logits, targets)
    assert loss.dtype is torch.float32
    assert loss.item() == 0.0
    loss.backward()
    assert torch.count_nonzero(logits.grad) == 0


def loss_and_gradients(model, tokens):
    torch.manual_seed(5)  # dropout
    model.zero_grad()
    loss = next_token_nll(model(tokens[:, :-1]), tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("config", [GPT2, DROPPING, LLAMA], ids=["gpt2", "gpt2-dropout", "llama"])
def test_recompute_changes_neither_loss_nor_gradients_nor_names(config, kind):
    model, tokens = model_and_tokens(config)
    names = list(model.state_dict())
    loss, gradients = loss_and_gradients(model, tokens)
    apply_recompute(model, kind)
    again, recomputed = loss_and_gradients(model, tokens)
    assert list(model.state_dict()) == names
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


def stored_elements(model, tokens):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        model(tokens)
    return sum(sizes)


def test_full_recompute_stores_less_and_none_brings_everything_back():
    model, tokens = model_and_tokens(LLAMA)
    before = stored_elements(model, tokens)
    apply_recompute(model, "full")
    apply_recompute(model, "full")
    assert stored_elements(model, tokens) < before / 2
    apply_recompute(model, "none")
    assert stored_elements(model, tokens) == before


def test_a_copy_of_a_recomputing_model_runs_its_own_weights():
    model, tokens = model_and_tokens(GPT2)
    apply_recompute(model, "full")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.blocks.parameters():
            parameter.zero_()
    assert not torch.allclose(twin(tokens), model(tokens))


def test_dropout_acts_in_training_only():
    model, tokens = model_and_tokens(DROPPING)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_no_forward_branches():
    branches = ast.If | ast.IfExp | ast.While | ast.Match
    forwards = [
        (path.name, node)
        for path in MODEL_CODE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in ("forward", "decode", "hidden")
    ]
    assert len(forwards) > 10
    for file, function in forwards:
        found = [node.lineno for node in ast.walk(function) if isinstance(node, branches)]
        assert not found, f"{file}: {function.name} branches in line {found}"


def test_only_build_and_the_formulas_read_the_configuration():
    readers = {path.name for path in MODEL_CODE.glob("*.py") if "megagpt.config" in path.read_text()}
    assert readers == {"build.py", "flops.py", "memory.py"}
