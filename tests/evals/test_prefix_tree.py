"""What runs, and what is read where: the planner without a model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from evals.backend import MegaGPTLM
from evals.encoding import encode_pairs
from evals.prefix_tree import LEAST_SHARED, Continuation, Node, Plan, cut_in_parts, plan_forwards
from evals.scoring import quiet_bars
from evals.task_loader import load_task, plan_from_folders, plan_task
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer
from tests.evals.conftest import SHARED
from tests.evals.fixtures import write_dataset

HEADER = list(range(100, 130))


def some_inputs(seed: int) -> list[Continuation]:
    """A few branching beginnings, inputs inside inputs, and equal inputs with different targets."""
    draw = random.Random(seed)
    inputs: list[list[int]] = [[1]]
    for _ in range(60):
        kept = draw.choice(inputs)
        inputs.append([*kept[: draw.randint(1, len(kept))], *(draw.randrange(3) for _ in range(draw.randint(0, 25)))])
    return [
        Continuation.of(tokens, [draw.randrange(9) for _ in range(draw.randint(1, len(tokens)))]) for tokens in inputs
    ]


def paths(plan: Plan):
    """(tokens of the whole path, node) of every node."""
    waiting: list[tuple[list[int], Node]] = [([], root) for root in plan.roots]
    while waiting:
        above, node = waiting.pop()
        assert node.start == len(above)
        whole = [*above, *node.tokens]
        yield whole, node
        waiting += [(whole, child) for child in node.children]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_every_scored_token_is_read_once_behind_its_own_input(seed, share) -> None:
    continuations = some_inputs(seed)
    plan = plan_forwards(continuations, share_prefixes=share)
    found: dict[tuple[int, int], tuple[list[int], int]] = {}
    for whole, node in paths(plan):
        for read in node.reads:
            for i, target in enumerate(read.targets):
                assert (read.continuation, read.at + i) not in found
                found[read.continuation, read.at + i] = (whole[: node.start + read.first + i + 1], target)
    expected = {}
    for index, each in enumerate(continuations):
        tokens = each.tokens()
        for i, target in enumerate(each.targets):
            expected[index, i] = (tokens[: len(tokens) - each.n_scored + i + 1], target)
    assert found == expected


@pytest.mark.parametrize("seed", range(4))
def test_no_sharing_that_is_worth_it_is_missed(seed: int) -> None:
    continuations = some_inputs(seed)
    plan = plan_forwards(continuations)
    whole = {tuple(each.tokens()) for each in continuations}
    least = len({tokens[:n] for tokens in whole for n in range(1, len(tokens) + 1)})
    n_leaves = len(whole)
    assert least <= plan.n_tokens < least + n_leaves * LEAST_SHARED
    assert plan.n_tokens == sum(len(node.tokens) for node in plan.nodes())
    assert plan.n_tokens_naive == sum(len(each.tokens()) for each in continuations)


def test_header_question_and_choices_are_three_levels() -> None:
    questions = [[7] * 10, [8] * 12]
    continuations = [
        Continuation.of([*HEADER, *question, *choice], [choice[-1]])
        for question in questions
        for choice in ([1, 2], [2, 2, 2], [3])
    ]
    plan = plan_forwards(continuations)
    (root,) = plan.roots
    assert root.tokens == tuple(HEADER)
    assert sorted(len(node.tokens) for node in root.children) == [10, 12]
    assert plan.n_tokens == 30 + 10 + 12 + 2 * (2 + 3 + 1)
    assert root.height == 3


def test_a_few_shared_tokens_are_not_worth_a_step() -> None:
    continuations = [Continuation.of([5] * (LEAST_SHARED - 1) + [i] * 4, [0]) for i in range(3)]
    assert [len(root.tokens) for root in plan_forwards(continuations).roots] == [LEAST_SHARED + 3] * 3


@pytest.mark.parametrize("n_parts", [1, 2, 3, 7, 200])
def test_parts_hold_everything_once_and_cost_alike(n_parts: int) -> None:
    continuations = [Continuation.of([*HEADER, i % 40, i, i, i], [i]) for i in range(160)]
    parts = cut_in_parts(continuations, n_parts)
    assert len(parts) <= n_parts
    assert sorted((each for part in parts for each in part), key=lambda each: each.targets) == continuations
    costs = [plan_forwards(part).n_tokens for part in parts]
    assert max(costs) - min(costs) <= len(HEADER) + 4 + sum(costs) / len(costs) / 4


def encode_all(tasks, tokenizer) -> list:
    """(context, continuation) ids of all requests."""
    with quiet_bars():
        for task in tasks.values():
            task.build_all_requests(limit=None, rank=0, world_size=1)
    pairs = [request.args for task in tasks.values() for request in task.instances]
    return list(encode_pairs(tokenizer, pairs, tokenizer.eot_id))


def plan_encoded(encoded: list, max_seq_len: int) -> Plan:
    lm = MegaGPTLM.__new__(MegaGPTLM)
    lm.max_length = max_seq_len
    return plan_forwards([lm._fit(*pair) for pair in encoded])


def test_five_shots_and_four_letters_cost_a_tenth_of_the_naive_tokens(tokenizer, tmp_path: Path) -> None:
    """A subject in the shape of MMLU: its examples run once, and a question's four letters once."""
    rows = [
        {
            "question": f"Word {i} and then the {i * i}th: which of them stands first in this long question?",
            "subject": "anatomy",
            "choices": [f"choice {i + j}" for j in range(4)],
            "answer": i % 4,
        }
        for i in range(45)
    ]
    write_dataset(tmp_path, "cais/mmlu", {"anatomy": {"dev": rows[:5], "test": rows[5:]}})
    plan = plan_from_folders("mmlu_anatomy", {"cais/mmlu": tmp_path / "cais/mmlu"}, tmp_path / "cache")
    encoded = encode_all(load_task(plan, 5, check_counts=False).tasks, tokenizer)
    found = plan_encoded(encoded, 1 << 20)
    assert found.n_tokens * 10 < sum(len(context) + len(continuation) for context, continuation in encoded)
    assert len(found.roots) == 1


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SHARED.is_dir(), reason="no benchmark files in shared/data/evals")
def test_all_of_mmlu_with_five_shots_computes_at_most_four_million_tokens(tokenizer, tmp_path: Path) -> None:
    """With GPT-2's tokens where tiktoken has them in its cache; else with longer prompts, in the same ratio."""
    try:
        tokenizer, is_gpt2 = open_tokenizer("gpt2"), True
    except DataError:
        is_gpt2 = False
    encoded = encode_all(load_task(plan_task("mmlu", SHARED, tmp_path), 5).tasks, tokenizer)
    naive = sum(len(context) + len(continuation) for context, continuation in encoded)
    assert plan_encoded(encoded, 1 << 20).n_tokens / naive <= 4.0 / 39.6
    if is_gpt2:
        assert naive == 39_619_584
        assert plan_encoded(encoded, 1024).n_tokens <= 4_000_000
        assert plan_encoded(encoded, 1 << 20).n_tokens <= 1_400_000
