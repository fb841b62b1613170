"""Generation against Hugging Face's, and each rule of sampling by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megagpt.checkpoint.hf import hf_state_to_model
from megagpt.config.schema import GPT2Model, LlamaModel
from megagpt.drafts import GUESSED, SAME, Drafts
from megagpt.errors import ConfigError
from megagpt.generate import Sampling, continue_texts, generate, sample
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from megagpt.model.layers import KVCache
from megagpt.model.packed import row_invariant
from megagpt.tokenizer import open_tokenizer

GPT2 = GPT2Model(family="gpt2", n_layer=2, n_head=4, d_model=32, vocab_size=67, max_seq_len=40)
LLAMA = LlamaModel(family="llama", n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=48, vocab_size=67, max_seq_len=40)
FAMILIES = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
PROMPTS = [[5, 9, 2, 44, 7, 61, 3], [8], [30, 31, 32, 33], [66, 65]]


def lively(config):
    """Random weights large enough that greedy text does not get stuck on one token."""
    model = build_model(config)
    init_weights(model, 4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def hf_twin(config):
    """A Hugging Face model with random weights, and ours with the same."""
    torch.manual_seed(6)
    if config.family == "gpt2":
        sizes = GPT2Config(vocab_size=67, n_positions=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4)
        theirs = GPT2LMHeadModel(sizes)
    else:
        sizes = LlamaConfig(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=40,
            rms_norm_eps=1e-5,
            initializer_range=0.4,
        )
        theirs = LlamaForCausalLM(sizes)
    ours = build_model(config)
    ours.load_state_dict(hf_state_to_model(config, theirs.state_dict()))
    return theirs.eval(), ours


@FAMILIES
def test_greedy_text_of_unequal_prompts_equals_hugging_faces(config):
    theirs, ours = hf_twin(config)
    theirs.generation_config.eos_token_id = None
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=25, do_sample=False, pad_token_id=0)
    tokens = generate(ours, PROMPTS, 25)
    assert tokens == expected[:, width:].tolist()
    assert all(len(set(row)) > 4 for row in tokens)


@FAMILIES
def test_greedy_text_is_what_the_uncached_model_says(config):
    model = lively(config)
    batched = generate(model, PROMPTS, 20)
    for prompt, new in zip(PROMPTS, batched, strict=True):
        tokens = list(prompt)
        for _ in range(20):
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        assert tokens[len(prompt) :] == new


def test_a_row_ends_before_a_stop_token_and_the_others_go_on():
    model = lively(LLAMA)
    free = generate(model, PROMPTS, 20)
    stop = free[1][6]
    stopped = generate(model, PROMPTS, 20, stop_ids={stop})
    for before, after in zip(free, stopped, strict=True):
        assert after == (before[: before.index(stop)] if stop in before else before)
    assert len(stopped[1]) <= 6


def test_on_token_sees_every_token_and_can_end_its_row():
    model = lively(GPT2)
    free = generate(model, PROMPTS, 12)
    seen = [[] for _ in PROMPTS]

    def third_ends_row_two(row, token):
        seen[row].append(token)
        return row == 2 and len(seen[row]) == 3

    result = generate(model, PROMPTS, 12, on_token=third_ends_row_two)
    assert result == seen
    assert result == [free[0], free[1], free[2][:3], free[3]]


def test_a_sampled_row_does_not_depend_on_the_batch_but_on_seed_and_row():
    model = lively(LLAMA)
    sampling = Sampling(temperature=1.0, seed=3)
    both = generate(model, [PROMPTS[0], PROMPTS[0]], 15, sampling)
    assert generate(model, [PROMPTS[0]], 15, sampling) == both[:1]
    assert both[0] != both[1]
    assert generate(model, [PROMPTS[0]], 15, Sampling(temperature=1.0, seed=4)) != both[:1]


def frequencies(sampling, probabilities, draws=4000):
    logits = torch.log(torch.tensor([probabilities])).expand(draws, -1)
    uniforms = (torch.arange(draws) + 0.5) / draws
    counts = torch.bincount(sample(logits, sampling, uniforms), minlength=len(probabilities))
    return (counts / draws).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.1, 0.5, 0.25, 0.15]),
        (Sampling(temperature=0.5), [p * p / 0.345 for p in (0.1, 0.5, 0.25, 0.15)]),
        (Sampling(temperature=1.0, top_k=2), [0.0, 2 / 3, 1 / 3, 0.0]),
        (Sampling(temperature=1.0, top_k=9), [0.1, 0.5, 0.25, 0.15]),
        (Sampling(temperature=1.0, top_p=0.4), [0.0, 1.0, 0.0, 0.0]),
        (Sampling(temperature=1.0, top_p=0.6), [0.0, 2 / 3, 1 / 3, 0.0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), [0.0, 2 / 3, 1 / 3, 0.0]),
        (Sampling(temperature=1.0, top_p=1.0), [0.1, 0.5, 0.25, 0.15]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_worked_by_hand(sampling, expected):
    assert frequencies(sampling, [0.1, 0.5, 0.25, 0.15]) == pytest.approx(expected, abs=1e-3)


def test_the_largest_uniform_never_picks_a_token_that_was_cut_off():
    uniforms = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float32)  # rounds to 1.0
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.25, 0.15]]))
    assert sample(logits, Sampling(temperature=1.0, top_p=0.6), uniforms).item() == 2


def test_the_models_mode_is_given_back():
    model = lively(GPT2.model_copy(update={"dropout": 0.5}))
    assert model.training
    assert generate(model, [[1]], 5) == generate(model, [[1]], 5)
    assert model.training


def test_a_prompt_may_fill_the_context_to_the_last_token():
    model = lively(GPT2)
    assert len(generate(model, [list(range(30))], 10)[0]) == 10
    with pytest.raises(ConfigError, match="context of 40; shorten the prompt, or ask for at most 10 new tokens"):
        generate(model, [[1], list(range(30))], 11)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 is empty"), ([[67]], "prompt 0 holds token 67, but the model knows 0 to 66")],
)
def test_bad_prompts_are_refused(prompts, message):
    with pytest.raises(ConfigError, match=message):
        generate(build_model(GPT2), prompts, 3)


def test_nothing_asked_gives_nothing():
    model = build_model(GPT2)
    assert generate(model, [], 5) == []
    assert generate(model, [[1], [2]], 0) == [[], []]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"temperature": -1.0}, "temperature -1.0"), ({"top_k": 0}, "top_k 0"), ({"top_p": 0.0}, "top_p 0.0")],
)
def test_sampling_refuses_values_that_mean_nothing(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**wrong)


def test_texts_are_continued_up_to_the_end_of_text_token(tmp_path):
    letters = {chr(97 + i): i for i in range(26)}
    bpe = Tokenizer(models.BPE(letters, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    model = lively(LLAMA.model_copy(update={"vocab_size": 27}))

    texts = continue_texts(model, tokenizer, ["hi", "there", ""], 10)

    expected = generate(model, [[7, 8], [19, 7, 4, 17, 4], [26]], 10, stop_ids={26})
    letters_of = ["".join(chr(97 + token) for token in row) for row in expected]
    assert texts == ["hi" + letters_of[0], "there" + letters_of[1], letters_of[2]]
    assert [len(row) for row in expected] == [10, 5, 6]  # the last two end at the end-of-text token


@FAMILIES
@pytest.mark.parametrize("n_stops", [0, 3])
def test_guessed_tokens_change_no_text_and_save_passes(config, n_stops, monkeypatch):
    model = build_model(config.model_copy(update={"max_seq_len": 200, "vocab_size": 31}))
    init_weights(model, 4)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(31, (n,), generator=generator).tolist() for n in (1, 2, 17, 40, 3)]
    stops = range(n_stops)
    model.packing = row_invariant(model.sizes.d_model, torch.get_num_threads())
    passes = Counter()
    decode = model.decode

    def counted(*words):
        passes[way] += 1
        return decode(*words)

    monkeypatch.setattr(model, "decode", counted)
    found = {}
    for way, guessed in (("one by one", 0), ("guessed", 3)):
        monkeypatch.setattr("megagpt.drafts.GUESSED", guessed)
        found[way] = generate(model, prompts, 150, stop_ids=stops)
    assert found["guessed"] == found["one by one"]
    assert passes["guessed"] < 0.7 * passes["one by one"]
    assert [generate(model, [prompt], 150, stop_ids=stops) for prompt in prompts] == [[one] for one in found["guessed"]]


def test_a_row_that_is_ended_by_its_caller_ends_there_though_more_was_guessed():
    model = build_model(GPT2.model_copy(update={"max_seq_len": 200, "vocab_size": 31}))
    init_weights(model, 4)
    model.packing = row_invariant(model.sizes.d_model, torch.get_num_threads())
    (whole,) = generate(model, [[5, 6]], 100)
    seen = []
    (cut,) = generate(model, [[5, 6]], 100, on_token=lambda _, token: seen.append(token) or len(seen) == 41)
    assert cut == seen == whole[:41]


@FAMILIES
def test_prompts_are_read_a_few_at_a_time_and_continued_together(config, monkeypatch):
    model = lively(config)
    model.packing = row_invariant(model.sizes.d_model, torch.get_num_threads())
    read = []
    decode = model.decode

    def seen(tokens, cache, n_new, n_wanted=None):
        if n_wanted is None:
            read.append(len(n_new))
        return decode(tokens, cache, n_new, n_wanted)

    together = generate(model, PROMPTS, 25, stop_ids={7})
    monkeypatch.setattr(model, "decode", seen)
    assert generate(model, PROMPTS, 25, stop_ids={7}, batch_size=3) == together
    assert read == [3, 1]
    assert len({len(row) for row in together}) > 1  # rows end at different steps


@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n))))
def test_rows_that_are_dropped_leave_the_others_as_they_were(case):
    n, gone = case
    cache = KVCache(2, (n, 5, 1, 3), like=torch.empty(0))
    for stored in cache.keys + cache.values:
        stored.copy_(torch.randn(n, 5, 1, 3))
    cache.lengths = [1 + row % 5 for row in range(n)]
    before = [
        (length, [s[row, :length].clone() for s in cache.keys + cache.values])
        for row, length in enumerate(cache.lengths)
    ]
    kept = cache.drop_rows(sorted(gone))
    assert sorted(kept) == sorted(set(range(n)) - gone)
    for place, row in enumerate(kept):
        length, values = before[row]
        assert cache.lengths[place] == length
        assert all(
            torch.equal(s[place, :length], old) for s, old in zip(cache.keys + cache.values, values, strict=True)
        )


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 5))
def test_a_guess_continues_the_text_as_it_went_on_the_last_time(tokens, most):
    guess = Drafts(tokens).next(most)
    places = [at for at in range(SAME, len(tokens)) if tokens[at - SAME : at] == tokens[-SAME:]]
    assert len(guess) == (min(most, GUESSED) if places else 0)
    text = tokens + guess
    assert guess == [text[places[-1] + i] for i in range(len(guess))]
