"""Bits per byte of the right answer and its margin, by hand."""

from __future__ import annotations

import math

import pytest

from evals.gold import gold_scores


def sample(logprobs, choices, target):
    return {"logprobs": logprobs, "choices": choices, "target": target}


def test_two_documents_by_hand() -> None:
    """A right answer of 4 bytes at 2^-8 has 2 bits a byte; one of 2 bytes (an accented letter) at 2^-8 has 4."""
    bits = [
        sample([-8 * math.log(2), -1.0, -2.0], [" one", " two", " six"], 0),
        sample([-9.0, -8 * math.log(2)], ["ab", "é"], 1),
    ]
    found = gold_scores(bits)
    assert found is not None
    assert found.n == 2
    assert found.bits_per_byte == pytest.approx((2 + 4) / 2)
    first, second = -8 * math.log(2) + 1.0, -8 * math.log(2) + 9.0
    assert found.margin == pytest.approx((first + second) / 2)
    # Of two values the standard error of their mean is half their difference.
    assert found.bits_per_byte_stderr == pytest.approx((4 - 2) / 2)
    assert found.margin_stderr == pytest.approx(abs(first - second) / 2)


def test_a_single_continuation_has_no_margin() -> None:
    found = gold_scores([sample([-math.log(2)], [" a"], "whatever the task says")])
    assert found is not None
    assert (found.bits_per_byte, found.margin) == (pytest.approx(0.5), None)
    assert (found.bits_per_byte_stderr, found.margin_stderr) == (None, None)


def test_a_model_that_diverged_has_no_number_and_ends_nothing() -> None:
    found = gold_scores([sample([math.nan, -1.0], [" a", " b"], 0), sample([-1.0, -2.0], [" a", " b"], 0)])
    assert found is not None
    assert all(map(math.isnan, (found.bits_per_byte, found.margin, found.bits_per_byte_stderr, found.margin_stderr)))


@pytest.mark.parametrize(
    "left_out",
    [
        {**sample([-1.0, -2.0], [" a", " b"], 0), "right": [0, 1]},  # truthfulqa_mc2's: the target is 0 in all of them
        sample([-1.0, -2.0], [" a", " b"], [1, 0]),
        sample([-1.0, -2.0], [" same", " same"], 0),  # the choices are prompts
        sample([-1.0, -2.0], [" a", " b"], 2),
        {"target": "4", "response": "four"},  # generated
    ],
)
def test_documents_without_one_right_answer_are_left_out(left_out) -> None:
    assert gold_scores([left_out]) is None
    found = gold_scores([left_out, sample([-1.0, -3.0], [" a", " b"], 0)])
    assert found is not None
    assert found.n == 1
