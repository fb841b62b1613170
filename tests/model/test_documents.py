"""Packed documents do not see each other: each is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megagpt.config.schema import GPT2Model, LlamaModel
from megagpt.errors import ConfigError
from megagpt.model.attention import (
    IMPLEMENTATIONS,
    ChosenAttention,
    Sizes,
    block_mask,
    choose_attention,
    dense_mask,
    stretches,
)
from megagpt.model.batch import TokenBatch
from megagpt.model.build import build_model
from megagpt.model.context import positions_within
from megagpt.model.decoder import use_attention
from megagpt.model.init import init_weights
from megagpt.model.loss import IGNORED_TARGET, next_token_nll
from megagpt.model.recompute import apply_recompute

GPT2 = GPT2Model(family="gpt2", n_layer=2, n_head=3, d_model=24, vocab_size=53, max_seq_len=30)
LLAMA = LlamaModel(
    family="llama", n_layer=2, n_head=4, n_kv_head=2, d_model=24, d_ff=37, vocab_size=53, max_seq_len=30, qk_norm=True
)
FAMILIES = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LENGTHS = [[7, 1, 22], [30], [1, 1, 1, 27]]
ON_CPU = Sizes("cpu", torch.float32, 8, 0.0)


def ids(lengths: list[list[int]]) -> torch.Tensor:
    rows = [[number for number, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor(rows, dtype=torch.int32)


def random_ids(rows: int, T: int, often: float, seed: int = 0) -> torch.Tensor:
    begins = torch.rand(rows, T, generator=torch.Generator().manual_seed(seed)) < often
    begins[:, 0] = False
    return begins.int().cumsum(1).int()


def packed_model(config):
    model = build_model(config)
    init_weights(model, 3)
    use_attention(model, choose_attention("auto", ON_CPU, packed=True))
    return model


def whole_model(config):
    model = build_model(config)
    init_weights(model, 3)
    return model


def random_tokens(shape=(3, 30), seed=0):
    return torch.randint(53, shape, generator=torch.Generator().manual_seed(seed))


def test_positions_begin_at_0_in_each_document():
    assert positions_within(ids([[3, 1, 2], [6], [1, 4, 1]])).tolist() == [
        [0, 1, 2, 0, 0, 1],
        [0, 1, 2, 3, 4, 5],
        [0, 0, 1, 2, 3, 0],
    ]


@FAMILIES
@pytest.mark.parametrize("changed", [0, 2])
def test_the_tokens_of_a_document_do_not_move_the_logits_of_another(config, changed):
    model, tokens, documents = packed_model(config), random_tokens(), ids(LENGTHS)
    before = model(tokens, documents)
    there = documents == changed
    after = model(torch.where(there, (tokens + 1) % 53, tokens), documents)
    assert torch.equal(before[~there], after[~there])
    assert not torch.isclose(before[there], after[there]).all(dim=-1).any()


@FAMILIES
def test_without_isolation_they_do(config):
    tokens, there = random_tokens(), ids(LENGTHS) == 0
    model = whole_model(config)
    after = model(torch.where(there, (tokens + 1) % 53, tokens))
    assert not torch.equal(model(tokens)[0, 7:], after[0, 7:])


@FAMILIES
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_logits_and_gradients_are_those_of_each_document_alone(config, recompute):
    packed, alone = packed_model(config), whole_model(config)
    apply_recompute(packed, recompute)
    tokens, documents = random_tokens(), ids(LENGTHS)
    batch = TokenBatch.of_windows(
        torch.cat((tokens, random_tokens((3, 1), seed=1)), dim=1), torch.cat((documents, documents[:, -1:]), dim=1)
    )
    logits = packed(batch.inputs, batch.documents)
    next_token_nll(logits, batch.targets).backward()
    for row, lengths in enumerate(LENGTHS):
        for number in range(len(lengths)):
            here = documents[row] == number
            expected = alone(tokens[row, here][None])
            torch.testing.assert_close(logits[row, here], expected[0], rtol=1e-5, atol=1e-6)
            next_token_nll(expected, batch.targets[row, here][None]).backward()
    for (name, found), expected in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-5, atol=1e-5, msg=name)


def test_with_dropout_documents_stay_apart():
    model = packed_model(GPT2.model_copy(update={"dropout": 0.3}))
    tokens, documents = random_tokens(), ids(LENGTHS)
    there = documents == 0
    torch.manual_seed(1)
    before = model(tokens, documents)
    torch.manual_seed(1)
    after = model(torch.where(there, (tokens + 1) % 53, tokens), documents)
    assert torch.equal(before[~there], after[~there])


def test_documents_and_a_model_that_does_not_know_them_are_refused_both_ways():
    with pytest.raises(ValueError, match="does not tell documents apart"):
        whole_model(GPT2)(random_tokens(), ids(LENGTHS))
    with pytest.raises(ValueError, match="was not told them"):
        packed_model(GPT2)(random_tokens())


def test_a_target_of_another_document_does_not_count():
    windows = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25], [31, 32, 33, 34, 35]])
    batch = TokenBatch.of_windows(windows, ids([[2, 2, 1], [5], [1, 4]]), counted=2)
    no = IGNORED_TARGET
    assert batch.targets.tolist() == [[12, no, 14, no], [22, 23, 24, 25], [no, no, no, no]]
    assert batch.documents.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
    assert batch.n_targets == 6


def test_a_stretch_of_a_batch_has_the_documents_of_whole_sequences():
    batch = TokenBatch.of_windows(torch.arange(14).view(2, 7), ids([[2, 5], [6, 1]]))
    parts = [batch.share(rank, 2).to(torch.device("cpu")) for rank in range(2)]
    assert torch.equal(torch.cat([part.inputs for part in parts], dim=1), batch.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts], dim=1), batch.targets)
    assert all(torch.equal(part.documents, batch.documents) for part in parts)
    assert TokenBatch.of_windows(torch.arange(14).view(2, 7)).share(0, 2).documents is None


@pytest.mark.parametrize("T", [5, 128, 300, 512])
@pytest.mark.parametrize("often", [0.0, 0.003, 0.02, 0.3])
def test_the_block_mask_is_the_one_that_pytorch_makes_from_the_whole_mask(T, often):
    documents = random_ids(3, T, often)

    def may_look(row, head, query, key):
        return (query >= key) & (documents[row, query] == documents[row, key])

    found, expected = block_mask(documents), create_block_mask(may_look, 3, None, T, T, device="cpu")
    assert found.shape == expected.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(found, f"{kind}_num_blocks"), getattr(found, f"{kind}_indices")
        assert torch.equal(counts, getattr(expected, f"{kind}_num_blocks"))
        counted = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices[counted], getattr(expected, f"{kind}_indices")[counted])
    if often == 0.02 and T == 512:  # the test is about something: some squares are empty, partly filled and full
        assert 0 < found.full_kv_num_blocks.sum() + found.kv_num_blocks.sum() < 3 * 10


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_it_gives_what_the_dense_mask_gives():
    documents = random_ids(2, 300, 0.01)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 16, generator=generator) for heads in (4, 2, 2))
    with torch.no_grad():  # on a CPU, PyTorch 2.13 has no backward
        found = flex_attention(q, k, v, block_mask=block_mask(documents), enable_gqa=True)
    expected = F.scaled_dot_product_attention(q, k, v, dense_mask(documents), enable_gqa=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_flex_attention_still_has_no_backward_on_a_cpu():
    """Once it has, `_refuses_flex` may let it."""
    q = torch.randn(1, 1, 128, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(q, q, q)


def test_stretches_are_where_each_document_of_each_row_begins():
    found = stretches(ids([[2, 3], [5], [1, 1, 3]]))
    assert found.bounds.tolist() == [0, 2, 5, 10, 11, 12, 15]
    assert found.bounds.dtype is torch.int32
    assert found.longest == 5


HALF_CUDA = Sizes("cuda", torch.bfloat16, 64, 0.0)
NO_PACKAGE = IMPLEMENTATIONS["flash"].refuses(HALF_CUDA) is not None
CHOICES = [
    ("auto", ON_CPU, False, "sdpa"),
    ("auto", ON_CPU, True, "sdpa"),
    ("sdpa", HALF_CUDA, True, "sdpa"),
    ("auto", HALF_CUDA, False, "sdpa"),
    ("auto", HALF_CUDA, True, "varlen" if NO_PACKAGE else "flash"),
    ("auto", Sizes("cuda", torch.float32, 64, 0.0), True, "flex"),
    ("auto", Sizes("cuda", torch.float32, 64, 0.1), True, "sdpa"),
    ("flex", HALF_CUDA, True, "flex"),
    ("varlen", HALF_CUDA, True, "varlen"),
]


@pytest.mark.parametrize(("name", "sizes", "packed", "expected"), CHOICES)
def test_auto_takes_the_first_that_can_be_used(name, sizes, packed, expected):
    chosen = choose_attention(name, sizes, packed=packed)
    assert chosen.name == expected
    assert (chosen.prepare is not None) == packed


REFUSED = [
    ("flex", ON_CPU, True, "no backward on cpu"),
    ("flex", Sizes("cuda", torch.bfloat16, 64, 0.1), True, "no dropout"),
    ("varlen", Sizes("cuda", torch.bfloat16, 64, 0.1), True, "no dropout"),
    ("varlen", ON_CPU, True, "no kernel for cpu"),
    ("flash", ON_CPU, False, "no kernel for cpu"),
    ("flash", Sizes("cuda", torch.float32, 64, 0.0), False, "in bf16 and fp16, not in float32"),
    ("varlen", Sizes("cuda", torch.float16, 512, 0.0), True, "at most 256 channels, not 512"),
    ("flex", HALF_CUDA, False, "for data.isolate_documents=true alone"),
]


@pytest.mark.parametrize(("name", "sizes", "packed", "complaint"), REFUSED)
def test_what_cannot_be_used_says_why(name, sizes, packed, complaint):
    with pytest.raises(ConfigError, match=rf"train.attention={name}.*{complaint}.*use train.attention=auto"):
        choose_attention(name, sizes, packed=packed)


@pytest.mark.skipif(not NO_PACKAGE, reason="flash-attn is installed")
def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="flash-attn package is not installed"):
        choose_attention("flash", HALF_CUDA, packed=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["flash", "varlen", "flex"])
@pytest.mark.parametrize("often", [0.0, 0.02, 0.3])
def test_every_kernel_gives_outputs_and_gradients_of_the_dense_mask(name, often):
    sizes = Sizes("cuda", torch.bfloat16, 64, 0.0)
    reason = IMPLEMENTATIONS[name].refuses(sizes)
    if reason is not None:
        pytest.skip(reason)
    documents = random_ids(3, 700, often).cuda()
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 700, heads, 64, generator=generator).cuda().bfloat16() for heads in (4, 2, 2, 4)]
    results = []
    for chosen in (choose_attention(name, sizes, packed=True), choose_attention("sdpa", sizes, packed=True)):
        results.append(output_and_gradients(chosen, documents, *given))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def output_and_gradients(chosen: ChosenAttention, documents, q, k, v, upstream):
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = chosen.attend(q, k, v, chosen.prepare(documents), dropout=0.0, grouped=True)
    out.backward(upstream.flatten(2))
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.gpu
@needs_gpu
def test_the_package_gives_for_whole_rows_what_pytorch_gives():
    sizes = Sizes("cuda", torch.bfloat16, 64, 0.0)
    reason = IMPLEMENTATIONS["flash"].refuses(sizes)
    if reason is not None:
        pytest.skip(reason)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 300, heads, 64, generator=generator).cuda().bfloat16() for heads in (4, 2, 2))
    found, expected = (
        choose_attention(name, sizes, packed=False).attend(q, k, v, None, dropout=0.0, grouped=True)
        for name in ("flash", "sdpa")
    )
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["flash", "varlen", "flex", "sdpa"])
@FAMILIES
def test_a_model_trains_on_a_gpu_with_every_kernel(name, config):
    sizes = Sizes("cuda", torch.bfloat16, 8, 0.0)
    reason = IMPLEMENTATIONS[name].refuses(sizes)
    if reason is not None:
        pytest.skip(reason)
    # Heads of 16 channels: the least that FlexAttention takes.
    config = config.model_copy(update={"d_model": 16 * config.n_head, "max_seq_len": 700})
    losses = []
    for chosen in (name, "sdpa"):
        model = build_model(config)
        init_weights(model, 3)
        use_attention(model, choose_attention(chosen, sizes, packed=True))
        model = model.cuda().bfloat16()
        tokens, documents = random_tokens((2, 701)), random_ids(2, 701, 0.02)
        batch = TokenBatch.of_windows(tokens, documents).to(torch.device("cuda"))
        loss = next_token_nll(model(batch.inputs, batch.documents), batch.targets) / batch.n_targets
        loss.backward()
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
