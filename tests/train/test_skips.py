"""Skipped batches: a pure function of the step and the ranges, and no batch is lost by a change in mid-run."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import CheckpointError, ConfigError
from megagpt.train.skips import batch_of, merged, passed, resumed
from tests.tiny import run_config

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda two: (two[0], two[0] + two[1])), max_size=6
)


def read_one_by_one(n, ranges):
    """The first n batches of a loop that looks at every one."""
    found, batch = [], 0
    while len(found) < n:
        if not any(first <= batch < end for first, end in ranges):
            found.append(batch)
        batch += 1
    return found


@given(RANGES)
def test_steps_read_the_batches_that_are_left(ranges):
    assert [batch_of(step, merged(ranges)) for step in range(80)] == read_one_by_one(80, ranges)


@given(RANGES, RANGES, st.integers(0, 60))
def test_a_resumed_run_reads_on_without_gap_or_repetition_or_is_refused(before, later, step):
    """Whatever is allowed leaves the batches before the step as they were read."""
    history = passed(step, merged(before))
    try:
        together = resumed(step, history, later)
    except CheckpointError:
        read = set(read_one_by_one(step, before))
        assert any(set(range(first, end)) & read for first, end in merged(later))
        return
    was_read = [batch_of(each, history) for each in range(step)]
    assert [batch_of(each, together) for each in range(step)] == was_read
    assert [batch_of(each, together) for each in range(step, step + 20)] == read_one_by_one(
        step + 20, [*history, *later]
    )[step:]


def test_a_late_range_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"train.skip_batches: \[10, 12\] begins before batch 23, .* at step 20"):
        resumed(20, ((5, 8),), [(5, 8), (10, 12)])


def test_what_a_rollback_skips_is_kept_though_it_lies_ahead():
    assert resumed(32, ((32, 41),), ()) == ((32, 41),)
    assert passed(32, ((32, 41),)) == ()
    assert passed(33, ((32, 41),)) == ((32, 41),)


def test_a_late_step_costs_no_more_than_an_early_one():
    """A loop over all batches would take minutes."""
    began = time.process_time()
    assert batch_of(10**15, ((10, 20), (10**12, 10**12 + 5))) == 10**15 + 15
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize("words", ["[[5, 5]]", "[[-1, 3]]", "[[7, 2]]"])
def test_what_is_no_range_is_refused_by_its_key(words, tokens, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.skip_batches(.|\n)*is no range"):
        run_config(tmp_path, tokens, f"train.skip_batches={words}")


def test_a_rollback_needs_checkpoints(tokens, tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.save_every is 0"):
        run_config(tmp_path, tokens, "watch.on_spike=rollback", "checkpoint.save_every=0")
