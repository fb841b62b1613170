"""A run whose whole folder lies on a disk that fills up, and later has room again: it ends as any other."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.checkpoint.test_full_disk import disk  # noqa: F401 - a fixture
from tests.distributed.processes import start, train_command
from tests.distributed.runs import metric_rows
from tests.distributed.test_resume import files_of, published, wait_until
from tests.tiny import run_words

STEPS = 400


@pytest.mark.exhaustive
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_on_a_disk_that_is_full_for_a_while_loses_nothing(world_size, disk, tmp_path, tokens):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,size=4M", str(disk)], check=True)
    usual = ["checkpoint.save_every=10", "checkpoint.retry_after=5", "checkpoint.keep_last=2"]
    usual += [f"train.max_steps={STEPS}", "log.tensorboard=true", "log.progress=true"]
    calm = start(train_command, world_size, run_words(tmp_path / "calm", tokens, *usual), log=tmp_path / "calm.log")
    calm.finish()
    run_dir = disk / "run"
    group = start(train_command, world_size, run_words(run_dir, tokens, *usual), log=tmp_path / "log")
    metrics, events, filler = run_dir / "metrics.jsonl", run_dir / "events.jsonl", disk / "filler"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 20, 60)
    fill(filler)
    wait_until(
        lambda: "rows wait in memory" in group.output() and "save_failed" in events.read_text() + group.output(), 60
    )
    filler.unlink()
    assert group.wait() == [0] * world_size, group.output()
    assert metric_rows(run_dir) == metric_rows(tmp_path / "calm")
    assert files_of(run_dir, STEPS) == files_of(tmp_path / "calm", STEPS)
    assert len(published(run_dir)) == 2
    assert "there is room again" in group.output()
    assert json.loads(events.read_text().splitlines()[-1])["event"] == "finished"


def fill(path):
    """Until not a byte more can be written, also not behind what lies there already."""
    with path.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while file.write(os.urandom(size)) == size:
                    pass
            except OSError:
                pass
