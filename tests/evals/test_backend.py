"""The backend by itself: batches, truncation, stop strings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from evals.backend import MegaGPTLM
from evals.decoding import TOGETHER, GenerationSettings, cut_at_first_stop, rows_together
from evals.forwards import CACHE_BYTES
from megagpt.errors import EvalError
from megagpt.generate import generate
from tests.evals.conftest import CONTEXT, TEXT


def scored(context: str, continuation: str, doc_id: int = 0) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0, metadata=("a_task", doc_id, 1))


def generated(context: str, doc_id: int = 0, **arguments: Any) -> Instance:
    return Instance("generate_until", {}, (context, {"until": [], **arguments}), 0, metadata=("a_task", doc_id, 1))


def requests() -> list[Instance]:
    return [scored(text[: 10 * i], text[10 * i : 10 * i + 4 * i + 3]) for text in TEXT for i in range(6)]


def test_batch_size_one_and_eight_give_the_same_log_likelihoods(model, tokenizer) -> None:
    one, eight = (MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=n) for n in (1, 8))
    for (a, greedy_a), (b, greedy_b) in zip(
        one.loglikelihood(requests()), eight.loglikelihood(requests()), strict=True
    ):
        assert a == pytest.approx(b, abs=2e-5)
        assert greedy_a == greedy_b


def test_batch_size_one_and_eight_give_the_same_text(model, tokenizer) -> None:
    one, eight = (MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=n) for n in (1, 8))
    prompts = [generated(text[: 7 * i], max_gen_toks=12) for text in TEXT for i in range(1, 5)]
    found = one.generate_until(prompts)
    assert found == eight.generate_until(prompts)
    assert any(found)


def test_a_log_likelihood_is_the_sum_of_the_models_own_log_probabilities(lm, model, tokenizer) -> None:
    context, continuation = tokenizer.encode("The quick brown"), tokenizer.encode(" fox jumps")
    tokens = torch.tensor([context + continuation])
    with torch.inference_mode():
        log_probabilities = model(tokens)[0].log_softmax(-1)
    at = len(context) - 1
    expected = sum(float(log_probabilities[at + i, token]) for i, token in enumerate(continuation))
    assert lm.loglikelihood([scored("The quick brown", " fox jumps")])[0][0] == pytest.approx(expected, abs=1e-5)


def test_equal_inputs_run_through_the_model_once(lm) -> None:
    letters = [scored("Answer:", f" {letter}") for letter in "abcd"]
    lm.loglikelihood(letters)
    inputs = [[*context, *rest][:-1] for context, rest in (lm._encode_pair(*request.args) for request in letters)]
    assert len({tuple(tokens) for tokens in inputs}) == 2  # " c" is two tokens
    assert lm.tokens_computed == sum(len(tokens) for tokens in {tuple(tokens) for tokens in inputs})
    assert lm.tokens_naive == sum(len(tokens) for tokens in inputs)


def test_what_inputs_share_runs_once(model, tokenizer) -> None:
    found = {}
    for share in (True, False):
        lm = MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=4, share_prefixes=share)
        answers = lm.loglikelihood([scored(TEXT[0], f" {n * 'word '}end") for n in range(1, 5)])
        found[share] = (lm.tokens_computed, [answer for answer, _ in answers])
    assert found[True][0] < found[False][0] / 2
    assert found[True][1] == pytest.approx(found[False][1], abs=2e-5)


def test_documents_that_lose_the_beginning_of_their_prompt_are_counted_once_a_task(lm) -> None:
    long = " ".join(TEXT * 4)
    lm.loglikelihood(
        [scored(long, " yes", 3), scored(long, " no", 3), scored("short", " yes", 4), scored(long, " a", 5)]
    )
    assert lm.truncated == {"a_task": {3, 5}}


def test_a_prompt_that_leaves_no_room_for_new_tokens_is_cut_and_counted(lm) -> None:
    lm.generate_until([generated(" ".join(TEXT * 4), 7, max_gen_toks=8), generated("short", 8, max_gen_toks=8)])
    assert lm.truncated == {"a_task": {7}}


def test_more_new_tokens_than_the_context_holds_are_an_error(lm) -> None:
    with pytest.raises(EvalError, match=f"generates {CONTEXT} tokens, but the model's context is {CONTEXT}"):
        lm.generate_until([generated("short", max_gen_toks=CONTEXT)])


def test_an_unknown_generation_argument_is_an_error(lm) -> None:
    with pytest.raises(EvalError, match="generation argument num_beams is not supported"):
        lm.generate_until([generated("short", num_beams=4)])


def test_text_is_cut_before_whichever_stop_string_comes_first() -> None:
    assert cut_at_first_stop("one. two\nthree", ["\n", "."]) == "one"
    assert cut_at_first_stop("one", ["\n"]) == "one"
    assert cut_at_first_stop("\none", ["\n"]) == ""


def test_generation_ends_at_a_stop_string_taken_from_its_own_text(lm) -> None:
    (free,) = lm.generate_until([generated(TEXT[0], max_gen_toks=30)])
    stop = free[5:8]
    assert len(stop) == 3
    assert lm.generate_until([generated(TEXT[0], until=[stop], max_gen_toks=30)]) == [free[: free.index(stop)]]


def test_prompts_and_generated_tokens_are_counted(model, tokenizer) -> None:
    """Against the decoder itself: each prompt, and each token that was chosen."""
    seen = []
    counted = MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=2)
    counted.generate_until([generated(text, max_gen_toks=9) for text in TEXT])
    prompts = [tokenizer.encode(text) for text in TEXT]
    written = generate(model, prompts, 9, stop_ids=(tokenizer.eot_id,), on_token=lambda _, token: seen.append(token))
    assert counted.tokens_computed == counted.tokens_naive == sum(map(len, prompts)) + sum(map(len, written))
    assert len(seen) == 3 * 9
    (free,) = counted.generate_until([generated(TEXT[0], max_gen_toks=30)])
    stopped = MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT)
    stopped.generate_until([generated(TEXT[0], until=[free[5:8]], max_gen_toks=30)])
    assert len(prompts[0]) < stopped.tokens_computed < len(prompts[0]) + 30


def test_answers_come_back_in_the_order_of_the_requests(lm) -> None:
    prompts = [generated(text, max_gen_toks=n) for n in (3, 9) for text in TEXT]
    together = lm.generate_until(prompts)
    assert together == [lm.generate_until([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("n_asked", "row_bytes", "expected"),
    [(1000, 1, TOGETHER), (20, 1, 20), (3, 1, 16), (1000, CACHE_BYTES // 40, 40), (1000, 2 * CACHE_BYTES, 16)],
)
def test_as_many_rows_are_written_together_as_memory_holds(n_asked: int, row_bytes: int, expected: int) -> None:
    assert rows_together(n_asked, batch_size=16, row_bytes=row_bytes) == expected


def test_sampling_is_repeatable_and_differs_between_repeats_of_a_prompt(model, tokenizer) -> None:
    prompts = [generated(TEXT[0], max_gen_toks=16, do_sample=True, temperature=1.0) for _ in range(4)]
    lm = MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=1)
    found = lm.generate_until(prompts)
    assert found == lm.generate_until(prompts)
    assert len(set(found)) > 1


def test_temperature_counts_only_where_the_task_samples() -> None:
    arguments = {"until": [], "max_gen_toks": 4, "do_sample": False, "temperature": 0.7}
    assert GenerationSettings.from_lm_eval(arguments, "t").sampling.temperature == 0.0


def test_a_tokenizer_larger_than_the_model_is_refused(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(type(tokenizer), "vocab_size", property(lambda _: 999))
    with pytest.raises(EvalError, match="999 tokens but the model only 384"):
        MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT)
