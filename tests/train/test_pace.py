"""Which rank holds the others up."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megagpt.parallel.mesh import Mesh
from megagpt.train.pace import WINDOWS, Pace


@dataclass(frozen=True)
class Ranks(Mesh):
    """Rank 0 among others whose times are written here."""

    times: dict = field(default_factory=dict)
    """rank -> what its medians are multiplied with."""

    def gather_numbers(self, *values):
        return [
            [value * times for value, times in zip(values, self.of(rank), strict=True)]
            for rank in range(self.world_size)
        ]

    def of(self, rank):
        return self.times.get(rank, (1.0, 1.0, 1.0))


def named(mesh, n_steps=100, data=0.001, forward=0.03, step=0.1, noise=0.0, every=10):
    random = np.random.default_rng(0)
    pace = Pace(mesh, every)
    found = {}
    for number in range(1, n_steps + 1):
        times = 1 + noise * random.normal(size=3)
        for slow in pace.note(*(np.array([data, forward, step]) * times).tolist()):
            found.setdefault(number, []).append((slow.rank, slow.part, round(slow.times, 2)))
    return found


def ranks(world_size, times, pipeline=1):
    return Ranks(0, world_size, 0, torch.device("cpu"), pipeline=pipeline, times=times)


def test_a_rank_twenty_percent_slower_is_named_once_within_fifty_steps():
    assert named(ranks(4, {2: (1.0, 1.2, 1.0)})) == {10 * WINDOWS: [(2, "computing", 1.2)]}


def test_of_two_ranks_too():
    assert named(ranks(2, {1: (1.0, 1.2, 1.0)}))[10 * WINDOWS] == [(1, "computing", 1.2)]


def test_slow_reading_counts_where_it_is_worth_something():
    assert named(ranks(4, {3: (5.0, 1.0, 1.0)})) == {40: [(3, "reading data", 5.0)]}
    assert named(ranks(4, {3: (2.0, 1.0, 1.0)})) == {}  # 1 ms of 100 ms


def test_ten_percent_are_not_told():
    assert named(ranks(4, {1: (1.0, 1.1, 1.0)})) == {}


def test_a_pause_of_a_few_steps_is_not_told():
    mesh = ranks(4, {1: (1.0, 1.5, 1.0)})
    assert named(mesh, n_steps=10 * WINDOWS - 1) == {}


def test_stages_are_compared_among_themselves():
    """Ranks 2 and 3 are the second stage, which has more to do."""
    assert named(ranks(4, {2: (1.0, 2.0, 1.0), 3: (1.0, 2.0, 1.0)}, pipeline=2)) == {}
    assert named(ranks(4, {2: (1.0, 2.0, 1.0), 3: (1.0, 2.5, 1.0)}, pipeline=2)) == {40: [(3, "computing", 1.25)]}


def test_a_single_process_and_a_watch_switched_off_compare_nothing():
    assert named(ranks(1, {})) == {}
    assert named(ranks(4, {2: (1.0, 9.0, 1.0)}), every=0) == {}
