"""megagpt.data.order: the keyed bijection."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.order import order_key, permute, permute_array


def run_alone(program: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2]
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@given(n=st.integers(1, 3000), parts=st.lists(st.integers(0, 2**70), max_size=3))
@settings(max_examples=60, deadline=None)
def test_every_position_is_taken_once(n, parts):
    assert sorted(permute_array(np.arange(n), n, order_key(*parts))) == list(range(n))


def test_every_small_n_is_a_bijection():
    for n in range(1, 200):
        assert sorted(permute(i, n, order_key(5)) for i in range(n)) == list(range(n))


@given(n=st.integers(1, 2**62), seed=st.integers(0, 2**32), data=st.data())
@settings(max_examples=100, deadline=None)
def test_one_at_a_time_and_all_at_once_agree_at_any_size(n, seed, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20, unique=True))
    key = order_key(seed)
    one_at_a_time = [permute(i, n, key) for i in indices]
    assert permute_array(np.array(indices), n, key).tolist() == one_at_a_time
    assert len(set(one_at_a_time)) == len(indices)
    assert all(0 <= i < n for i in one_at_a_time)


def test_different_seeds_and_epochs_give_different_orders():
    orders = {
        tuple(permute_array(np.arange(100), 100, order_key(*key))) for key in itertools.product(range(20), range(5))
    }
    assert len(orders) == 100


def test_key_parts_are_not_run_together():
    assert order_key(1, 23) != order_key(12, 3)


def test_the_order_is_the_same_in_every_process_and_forever():
    """A change of these numbers would shuffle the data of every run that is resumed."""
    program = (
        "from megagpt.data.order import order_key, permute\n"
        "print([permute(i, 10, order_key(1234, 0)) for i in range(10)], permute(10**12, 10**15, order_key(1234, 0)))"
    )
    shown = run_alone(program)
    assert shown.strip() == "[1, 0, 3, 5, 7, 8, 6, 4, 9, 2] 531193549646656"


def test_each_index_goes_everywhere_equally_often():
    """Chi-square over 4,000 keys; 9 degrees of freedom pass 27.9 once in a thousand times."""
    places = np.stack([permute_array(np.arange(10), 10, order_key(seed)) for seed in range(4000)])
    for index in range(10):
        counts = np.bincount(places[:, index], minlength=10)
        assert ((counts - 400) ** 2 / 400).sum() < 27.9


@pytest.mark.parametrize(("n", "limit"), [(3, 20.5), (4, 49.7)])
def test_each_order_of_a_few_comes_equally_often(n, limit):
    """Chi-square over all n! orders (5 and 23 degrees of freedom, one in a thousand)."""
    trials = 4800
    orders = Counter(tuple(permute(i, n, order_key(seed)) for i in range(n)) for seed in range(trials))
    expected = trials / len(list(itertools.permutations(range(n))))
    assert len(orders) == trials / expected
    assert sum((count - expected) ** 2 / expected for count in orders.values()) < limit


def test_neighbours_do_not_stay_together():
    order = permute_array(np.arange(10_000), 10_000, order_key(7))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04  # 4 standard deviations of 1 / sqrt(n)
    assert (np.abs(np.diff(order)) == 1).sum() < 15  # 2 expected


@pytest.mark.parametrize(("index", "n"), [(-1, 5), (5, 5), (0, 0), (0, 2**62 + 1)])
def test_positions_outside_are_refused(index, n):
    with pytest.raises(ValueError, match=r"must be in 0 \.\. n-1"):
        permute(index, n, order_key(0))
    with pytest.raises(ValueError, match=r"must be in 0 \.\. n-1"):
        permute_array(np.array([index]), n, order_key(0))
