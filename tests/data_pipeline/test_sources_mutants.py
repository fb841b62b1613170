"""10,000 damaged files: whatever the damage, reading ends, in time, with all that is intact, and says what is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_pipeline import mutants
from tests.data_pipeline.mutants import FORMATS, read_mutants

ROOT = Path(__file__).resolve().parents[2]
PARTS = 4
"""Tests a format, so that a failure names a few hundred seeds and not thousands."""


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", FORMATS)
def test_mutants_lose_what_was_hit_and_nothing_else(tmp_path: Path, name: str, part: int) -> None:
    n_each = FORMATS[name][1] // PARTS
    tally = read_mutants(name, range(part * n_each, (part + 1) * n_each), tmp_path)
    counts = tally.counts
    assert counts["mutants"] == n_each
    assert tally.faults == [], tally
    assert counts["intact lost"] <= 0.01 * counts["intact"], tally
    # The test would prove little if mutations hit nothing, or everything.
    assert counts["lost"] > 0 < counts["intact"], tally


def test_there_are_ten_thousand_of_them() -> None:
    assert sum(n for _, n in FORMATS.values()) == 10_000


@pytest.mark.parametrize("name", FORMATS)
def test_an_undamaged_sample_gives_every_text_without_a_report(tmp_path: Path, name: str) -> None:
    tally = mutants.Tally()
    for seed in range(3):
        sample = FORMATS[name][0](mutants.random.Random(seed))
        tally.read(sample, seed, sample.data, [], tmp_path)
    assert (tally.counts["lost"], tally.counts["damages"], tally.counts["altered"], tally.faults) == (0, 0, 0, [])


def test_damage_does_not_cost_memory() -> None:
    found = subprocess.run(
        [sys.executable, mutants.__file__],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    healthy_bytes, damaged_bytes = map(int, found.stdout.split())
    assert damaged_bytes <= 2 * healthy_bytes
