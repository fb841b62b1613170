"""What is a spike."""

from __future__ import annotations

import math

import numpy as np

from megagpt.train.spikes import SpikeRule

RULE = SpikeRule(sigmas=6.0, window=128)


def window(n, seed=0, scale=0.05):
    """A loss about 3 and a gradient norm about 1."""
    random = np.random.default_rng(seed)
    return tuple((3 + scale * float(random.normal()), 1 + scale * float(random.normal())) for _ in range(n))


def test_seven_sigmas_are_a_spike_and_five_are_none():
    recent = window(128)
    losses = [loss for loss, _ in recent]
    mean, sigma = float(np.mean(losses)), float(np.std(losses, ddof=1))
    assert not RULE.judge(recent, mean + 5.9 * sigma, 1.0)
    words = RULE.judge(recent, mean + 6.1 * sigma, 1.0)
    assert words.startswith("loss ")
    assert "6.1 sigmas above the mean" in words
    assert "of the last 128 steps" in words


def test_a_gradient_norm_is_a_spike_too_and_what_falls_is_none():
    recent = window(128)
    assert "gradient norm 9 is" in RULE.judge(recent, 3.0, 9.0)
    assert RULE.judge(recent, 30.0, 9.0).count("sigmas") == 2
    assert not RULE.judge(recent, 0.1, 0.001)


def test_nothing_is_judged_before_half_of_the_window_is_there():
    assert not RULE.judge(window(63), 100.0, 100.0)
    assert RULE.judge(window(64), 100.0, 100.0)


def test_a_constant_loss_has_no_spikes_in_its_last_digits():
    recent = tuple((3.0, 1.0) for _ in range(128))
    assert not RULE.judge(recent, 3.05, 1.01)
    assert "far above" in RULE.judge(recent, 3.1, 1.0)


def test_the_window_moves_on_and_takes_only_numbers():
    recent = window(128)
    assert RULE.added(recent, 2.5, 0.5) == (*recent[1:], (2.5, 0.5))
    assert RULE.added(recent, math.nan, 0.5) == recent
    assert RULE.added(recent, 2.5, math.inf) == recent


def test_normal_noise_gives_no_false_alarm_in_ten_thousand_steps():
    recent, found = window(128), 0
    for loss, norm in window(10_000, seed=1):
        found += bool(RULE.judge(recent, loss, norm))
        recent = RULE.added(recent, loss, norm)
    assert found == 0
