"""Learning rates worked by hand."""

import pytest

from megagpt.config.schema import OptimSection
from megagpt.train.schedule import SCHEDULES, lr_schedule


def rates(max_steps, **options):
    schedule = lr_schedule(OptimSection(lr=1.0, **options), max_steps)
    return [schedule(step) for step in range(max_steps)]


def test_warm_up_rises_from_one_part_to_the_peak():
    assert rates(9, schedule="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_cosine_ends_at_its_fraction_at_the_last_step():
    """Steps 2..6 are 0, 1/4, 1/2, 3/4, 1 of the way: (1 + cos(pi p)) / 2 is 1, .853553, .5, .146447, 0."""
    expected = [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.8535534, 0.55, 0.1 + 0.9 * 0.1464466, 0.1]
    assert rates(7, schedule="cosine", warmup_steps=2) == pytest.approx(expected)


def test_wsd_is_stable_and_then_falls_in_a_line():
    """11 steps, decay over the last 0.4 of the way: 0.6 is still 1, 0.8 half way, 1.0 the end."""
    found = rates(11, schedule="wsd", decay_frac=0.4, min_lr_frac=0.2)
    assert found == pytest.approx([1.0] * 7 + [0.8, 0.6, 0.4, 0.2])


def test_wsd_without_decay_stays_at_the_peak():
    assert rates(5, schedule="wsd", decay_frac=0.0) == [1.0] * 5


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("max_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_shortest_runs_have_a_rate_in_every_step(name, max_steps, warmup_steps):
    assert all(0 < rate <= 1 for rate in rates(max_steps, schedule=name, warmup_steps=warmup_steps))


def test_a_run_that_is_all_warm_up_reaches_the_peak_in_its_last_step():
    assert rates(4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]
