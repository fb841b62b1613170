"""Scores behind a key-value cache, against the plain forward pass; arithmetic that does not see the batch."""

from __future__ import annotations

import pytest
import torch

from megagpt.config.schema import GPT2Model, LlamaModel
from megagpt.model import packed, scoring
from megagpt.model.build import build_model
from megagpt.model.decoder import Decoder
from megagpt.model.init import init_weights
from megagpt.model.packed import FAST, row_invariant

SIZES = {"n_layer": 2, "d_model": 40, "vocab_size": 61, "max_seq_len": 300}
CONFIGS = [
    GPT2Model(family="gpt2", n_head=4, **SIZES),
    LlamaModel(family="llama", n_head=4, n_kv_head=2, d_ff=56, qk_norm=True, **SIZES),
]
LENGTHS = [5, 260, 1, 131]


@pytest.fixture(params=CONFIGS, ids=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Decoder:
    model = build_model(request.param)
    init_weights(model, seed=3)
    return model.eval()


def rows(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (n + 1,), generator=generator).tolist() for n in LENGTHS]


def scores(model: Decoder, some: list[list[int]], cuts: list[int]) -> list[list[float]]:
    """Log-probabilities of each row's tokens but the first; what stands before its cut goes into the cache first."""
    cache = model.new_cache(len(some), max(map(len, some)))
    found: list[list[float]] = [[] for _ in some]
    with torch.inference_mode():
        for part in ([row[: cut + 1] for row, cut in zip(some, cuts, strict=True)], some):
            starts = [len(each) for each in found]
            new = [len(row) - 1 - start for row, start in zip(part, starts, strict=True)]
            width = max(new)
            if width == 0:
                continue
            block = [[*row[s:-1], *[0] * (width - n)] for row, s, n in zip(part, starts, new, strict=True)]
            wanted = [b * width + i for b, n in enumerate(new) for i in range(n)]
            targets = [token for row, s in zip(part, starts, strict=True) for token in row[s + 1 :]]
            values, greedy = model.score(torch.tensor(block), cache, new, torch.tensor(wanted), torch.tensor(targets))
            assert greedy.dtype == torch.bool
            for each, some_values in zip(found, values.split(new), strict=True):
                each += some_values.tolist()
    return found


@pytest.mark.parametrize("invariant", [False, True])
def test_scores_are_the_log_probabilities_of_forward(model, invariant) -> None:
    model.packing = row_invariant(40, torch.get_num_threads()) if invariant else FAST
    found = scores(model, rows(), [3, 100, 0, 130])
    for row, values in zip(rows(), found, strict=True):
        with torch.inference_mode():
            whole = model(torch.tensor([row[:-1]]))[0].log_softmax(-1)
        assert values == pytest.approx(whole[range(len(row) - 1), row[1:]].tolist(), abs=2e-5)


def test_bits_do_not_depend_on_the_batch_nor_on_where_the_cache_ends_nor_on_pieces(model, monkeypatch) -> None:
    model.packing = row_invariant(40, torch.get_num_threads())
    together = scores(model, rows(), [0, 0, 0, 0])
    assert scores(model, rows(), [3, 100, 0, 127]) == together
    assert [scores(model, [row], [min(len(row) - 2, 2)])[0] for row in rows()] == together
    monkeypatch.setattr(packed, "SCORE_BYTES", 1)
    monkeypatch.setattr(packed, "QUERIES", 64)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 1)
    assert scores(model, rows(), [3, 100, 0, 127]) == together


@pytest.mark.parametrize("config", CONFIGS, ids=["gpt2", "llama"])
def test_bits_are_the_same_wherever_the_fused_kernel_ends_a_block_or_the_library_a_sum(config) -> None:
    """Rows that end beside those places, each alone, behind caches that end there too, and beside a longer row."""
    model = build_model(config.model_copy(update={"max_seq_len": 1000, "d_model": 64}))
    init_weights(model, seed=3)
    model.packing = row_invariant(64, torch.get_num_threads())
    generator = torch.Generator().manual_seed(1)
    long = torch.randint(61, (960,), generator=generator).tolist()
    (expected,) = scores(model, [long], [0])
    for n in (192, 193, 224, 383, 384, 385, 512, 513, 704, 705, 895, 897):
        row = long[: n + 1]
        assert scores(model, [row], [0]) == [expected[:n]], n
        assert scores(model, [row, long], [n - 4, n - 1]) == [expected[:n], expected], n


def test_a_target_is_greedy_where_no_token_is_more_probable(model) -> None:
    tokens = torch.tensor([rows()[0][:-1]])
    with torch.inference_mode():
        best = model(tokens)[0].argmax(-1)
        wanted = torch.arange(5).repeat(2)
        _, greedy = model.score(tokens, model.new_cache(1, 5), [5], wanted, torch.cat((best, (best + 1) % 61)))
    assert greedy.tolist() == [True] * 5 + [False] * 5


def test_nothing_wanted_fills_the_cache_and_gives_nothing(model) -> None:
    cache = model.new_cache(1, 5)
    nothing = torch.empty(0, dtype=torch.int64)
    with torch.inference_mode():
        values, greedy = model.score(torch.tensor([rows()[0][:-1]]), cache, [5], nothing, nothing)
    assert (values.shape, greedy.shape, cache.lengths) == ((0,), (0,), [5])


@pytest.mark.parametrize("invariant", [False, True])
def test_few_wanted_tokens_score_as_among_all_and_leave_the_same_cache(model, invariant) -> None:
    """The last block runs only what comes from the first wanted token on; one row here wants nothing."""
    model.packing = row_invariant(40, torch.get_num_threads()) if invariant else FAST
    width = max(LENGTHS)
    block = torch.tensor([[*row[:-1], *[0] * (width - n)] for row, n in zip(rows(), LENGTHS, strict=True)])
    every = [b * width + i for b, n in enumerate(LENGTHS) for i in range(n)]
    few = [1 * width + 259, 1 * width + 250, 2 * width, 3 * width + 129]
    found, caches = [], []
    with torch.inference_mode():
        for wanted in (every, few):
            caches.append(model.new_cache(len(LENGTHS), width))
            found.append(model.score(block, caches[-1], LENGTHS, torch.tensor(wanted), torch.full((len(wanted),), 7)))
        logits = model.decode(block, model.new_cache(len(LENGTHS), width), LENGTHS)
    at = [every.index(position) for position in few]
    ends = [every.index(b * width + n - 1) for b, n in enumerate(LENGTHS)]
    close = {"rtol": 0, "atol": 0} if invariant else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found[1][0], found[0][0][at], **close)
    torch.testing.assert_close(
        scoring.score_logits(logits, torch.arange(4), torch.full((4,), 7))[0], found[0][0][ends], **close
    )
    for row, n in enumerate(LENGTHS):
        for all_of_them, these in zip(*(cache.keys + cache.values for cache in caches), strict=True):
            torch.testing.assert_close(these[row, :n], all_of_them[row, :n], **close)


def test_the_last_block_runs_on_the_wanted_tokens_alone(model) -> None:
    n_tokens: list[list[int]] = [[], []]
    for block, seen in zip(model.blocks, n_tokens, strict=True):
        block.feed_forward.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].shape[1]))
    tokens = torch.tensor([rows()[1][:-1]])
    with torch.inference_mode():
        model.score(tokens, model.new_cache(1, 260), [260], torch.tensor([255, 257]), torch.tensor([1, 2]))
        model.decode(tokens, model.new_cache(1, 260), [260])
    assert n_tokens == [[260, 260], [5, 1]]


def test_tokens_are_filled_up_to_whole_vectors_of_every_thread() -> None:
    assert [row_invariant(768, 1).filled(n) for n in (1, 32, 33)] == [32, 32, 64]
    assert [row_invariant(768, 2).filled(n) for n in (1, 64, 65)] == [64, 64, 128]
    many = row_invariant(768, 16)
    assert many.filled(1) * 768 > 15 * 32768
    assert many.filled(1) % (16 * 32) == 0
