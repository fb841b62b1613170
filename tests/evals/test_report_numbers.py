from __future__ import annotations

import pytest

from evals.report_numbers import cell, count, duration, fence, interval


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10.00 k"),
        (12_345, "12.35 k"),
        (999_950, "1.00 M"),
        (1_234_567, "1.23 M"),
        (123_456_789, "123 M"),
        (7.3e9, "7.30 G"),
        (1.5e12, "1.50 T"),
        (4050.5, "4.05 k"),
        (0.25, "0.25"),
        (None, "not known"),
    ],
)
def test_counts_are_short_enough_to_say_aloud(number, text):
    assert count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1.26, "1.3 s"),
        (75, "1 min 15 s"),
        (3725, "1 h 02 min"),
        (259_200, "3.0 days"),
        (None, "not known"),
    ],
)
def test_durations_have_at_most_two_units(seconds, text):
    assert duration(seconds) == text


def test_markdown_cells_are_inert():
    assert cell("a|b\n<i>`x`</i> [l](u)") == "a\\|b &lt;i>\\`x\\`&lt;/i> \\[l](u)"


def test_a_fence_is_longer_than_any_fence_inside():
    assert fence("plain") == "```"
    assert fence("a ``` b ````` c") == "``````"


def test_an_interval_names_both_ends():
    assert interval((0.25, 0.5)) == "0.2500 to 0.5000"
    assert interval(None) == "none"
