"""The same scores and texts bit for bit, whatever is batched with what."""

from __future__ import annotations

import pytest
import torch
from lm_eval.api.instance import Instance
from torch import Tensor, nn

from evals.backend import MegaGPTLM
from evals.forwards import Answer, PlanRunner
from evals.heldout import heldout_loss
from evals.invariance import bits_of, make_batch_invariant
from evals.prefix_tree import Continuation, cut_in_parts, plan_forwards
from megagpt.data.indexed import TokenFileWriter
from megagpt.model.decoder import Decoder
from megagpt.model.packed import FAST
from tests.evals.conftest import CONFIGS, CONTEXT, TEXT, VOCAB_SIZE, random_model, scaled_up
from tests.evals.test_backend import generated, scored


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def exact(request: pytest.FixtureRequest) -> Decoder:
    model = random_model(request.param)
    assert make_batch_invariant(model)
    return model


def requests() -> list[Instance]:
    """Inputs of 1 to 240 tokens, of which some are cut: above and below one block of keys."""
    header = " ".join(TEXT)
    contexts = [header + f" Question {i}: {TEXT[i % 3][: 9 * i]}" for i in range(4)] + ["", *TEXT]
    return [scored(context, f" {choice}") for context in contexts for choice in ("yes", "no and no", TEXT[2][:40])]


@pytest.mark.parametrize("n_threads", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_scores_are_the_same_at_any_batch_size_with_and_without_sharing(tokenizer, n_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for family in CONFIGS:
            model = random_model(family)
            assert make_batch_invariant(model)
            found = []
            for batch_size, share in ((1, True), (16, True), (5, True), (1, False), (16, False)):
                lm = MegaGPTLM(model, tokenizer, max_seq_len=CONTEXT, batch_size=batch_size, share_prefixes=share)
                found.append(lm.loglikelihood(requests()))
            assert all(each == found[0] for each in found)
            assert len({value for value, _ in found[0]}) > 10
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("d_head", [6, 10, 16])
def test_what_is_called_row_invariant_is_so_wherever_a_row_is_cut(d_head: int) -> None:
    """MKL takes the rows of a product with 6 or 10 columns in pairs: a row's place in its pair decides its bits."""
    model, _ = scaled_up("gpt2", d_model=2 * d_head)
    if not make_batch_invariant(model):
        assert model.packing is FAST
        return
    row = torch.randint(VOCAB_SIZE, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model.decode(row, model.new_cache(1, CONTEXT), [CONTEXT], [CONTEXT])
        for cut in (1, 2, 31, 64, 101, CONTEXT - 1):
            cache, sizes = model.new_cache(1, CONTEXT), (cut, CONTEXT - cut)
            parts = [model.decode(part, cache, [n], [n]) for part, n in zip(row.split(sizes, 1), sizes, strict=True)]
            assert torch.equal(torch.cat(parts), whole), cut


def answers(model: Decoder, continuations: list[Continuation], batch_size: int, cache_bytes: int) -> dict:
    found: dict[Continuation, Answer] = {}
    runner = PlanRunner(
        model, continuations, batch_size, lambda i, answer: found.update({continuations[i]: answer}), cache_bytes
    )
    runner.run(plan_forwards(continuations))
    return found


def test_neither_memory_for_the_cache_nor_who_else_shares_the_work_changes_a_score(exact) -> None:
    continuations = [
        Continuation.of([*range(40), i % 7, *([i] * (i % 5 + 9)), i, i + 1], [i, i + 1, i + 2]) for i in range(30)
    ]
    together = answers(exact, continuations, 16, 1 << 30)
    assert len(together) == 30
    assert answers(exact, continuations, 16, 1) == together
    parts = [answers(exact, part, 3, 1 << 30) for part in cut_in_parts(continuations, 4)]
    assert {each: answer for part in parts for each, answer in part.items()} == together


def test_a_row_that_does_not_fit_into_a_new_cache_says_so(exact) -> None:
    cache = exact.new_cache(1, 4)
    exact.decode(torch.tensor([[1, 2, 3]]), cache, [3])
    with pytest.raises(ValueError, match="3 tokens does not fit into 2 slots"):
        cache.expanded([0], 2)


@pytest.mark.parametrize("sampled", [False, True])
def test_texts_are_the_same_at_any_batch_size(exact, tokenizer, sampled) -> None:
    how = {"do_sample": True, "temperature": 1.0} if sampled else {}
    prompts = [
        generated(text[: 7 * i], doc_id=10 * number + i, max_gen_toks=16, **how)
        for number, text in enumerate(TEXT)
        for i in range(1, 5)
    ]
    texts = [MegaGPTLM(exact, tokenizer, max_seq_len=CONTEXT, batch_size=n).generate_until(prompts) for n in (1, 5, 16)]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 6
    shuffled = MegaGPTLM(exact, tokenizer, max_seq_len=CONTEXT, batch_size=4).generate_until(prompts[::-1])
    assert shuffled[::-1] == texts[0]


def test_heldout_loss_is_the_same_at_any_batch_size(exact, tmp_path) -> None:
    with TokenFileWriter(tmp_path / "val", "<u2") as writer:
        writer.add_document([(7 * i * i) % VOCAB_SIZE for i in range(700)])
    found = {heldout_loss(exact, tmp_path / "val", max_seq_len=64, batch_size=n).nats_per_token for n in (1, 3, 16)}
    assert len(found) == 1


class Centred(nn.Module):
    """A layer in which the rows of a batch do depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=(0, 1))


def test_a_model_or_machine_for_which_it_does_not_hold_is_told_and_left_fast() -> None:
    model = random_model()
    model.final_norm = Centred()
    assert not make_batch_invariant(model)
    assert model.packing is FAST


def test_arithmetic_is_told_by_its_bits() -> None:
    """Equal weights and arithmetic have equal bits; sums in another order, or one other weight, have not."""
    one, same, other = random_model(), random_model(), random_model()
    with torch.no_grad():
        next(other.parameters())[1, 1] += 1e-4
    assert all(map(make_batch_invariant, (one, same, other)))
    assert bits_of(one) == bits_of(same) != bits_of(other)
    same.packing = FAST
    assert bits_of(one) != bits_of(same)
