"""What a save costs, measured on a small state; the bars themselves are for a state that takes a disk seconds."""

from __future__ import annotations

import json

import torch
from click.testing import CliRunner

from megagpt.bench.checkpoint import bench_checkpoint
from megagpt.cli import main


def test_the_figures_are_those_of_saves_that_were_made_and_removed(tmp_path):
    cost = bench_checkpoint(tmp_path, 30_000_000, rounds=2)
    assert 30_000_000 * 0.99 < cost.n_bytes < 30_000_000 * 1.01
    assert 0 < cost.checksum_seconds < cost.save_seconds
    assert cost.copy_seconds > 0
    assert cost.blocked_seconds < cost.save_seconds, "training does not wait for the disk"
    assert list(tmp_path.iterdir()) == []
    assert not torch.cuda.is_available() or cost.copy_seconds < cost.save_seconds


def test_the_command_prints_both_ratios_and_says_by_its_exit_code_whether_they_are_good(tmp_path):
    out = tmp_path / "cost.json"
    result = CliRunner().invoke(
        main,
        ["bench", "checkpoint", "--folder", str(tmp_path), "--gigabytes", "0.01", "--rounds", "1", "--json", str(out)],
    )
    found = json.loads(out.read_text())
    assert f"= {found['blocked_ratio']:.2f} x the copy" in result.output
    assert f"= {found['checksum_share']:.1%} of the save" in result.output
    assert result.exit_code == int(found["blocked_ratio"] >= 1.5 or found["checksum_share"] >= 0.05)
