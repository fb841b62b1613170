"""`megagpt train --restarts`: a killed run, whose newest checkpoint is damaged as well, ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megagpt.train.events import goodput
from tests.distributed.processes import start, train_command
from tests.distributed.test_resume import files_of, published, rows, step_dir, wait_until
from tests.tiny import run_words

MEGAGPT = Path(sys.executable).with_name("megagpt")
STEPS = 60


def ranks_below(pid):
    """The training processes that a supervisor's launcher has started."""
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if any(word.startswith("--local_rank=") for word in process.cmdline())]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_run_goes_on_by_itself_from_the_newest_good_checkpoint(tmp_path, tokens):
    common = [f"train.max_steps={STEPS}", "checkpoint.save_every=10", "parallel.zero_stage=2"]
    run_dir, log = tmp_path / "run", tmp_path / "log"
    port = str(20_000 + os.getpid() % 20_000)
    options = ["--restarts", "1", "--wait", "3", "--processes", "1", "--launcher-args", f"--master_port {port}"]
    with log.open("wb") as out:
        command = [MEGAGPT, "train", *options, *run_words(run_dir, tokens, *common)]
        supervisor = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    unbroken = start(train_command, 1, run_words(tmp_path / "unbroken", tokens, *common), log=tmp_path / "unbroken.log")
    try:
        wait_until(lambda: len(published(run_dir)) >= 2)
        for rank in ranks_below(supervisor.pid)[:1]:
            rank.send_signal(signal.SIGKILL)
        wait_until(lambda: "starting again" in log.read_text())
        newest = published(run_dir)[-1]
        damaged = step_dir(run_dir, newest) / "rank_00000.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
        assert supervisor.wait(200) == 0, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(supervisor.pid, signal.SIGTERM)
        supervisor.wait(60)
    unbroken.finish()
    told = log.read_text()
    assert "a process was ended by SIGKILL; starting again in 3 s from step" in told
    events = [event for event in lines_of(run_dir / "events.jsonl") if event["event"] != "saved"]
    assert [event["event"] for event in events] == ["started", "failed", "set_aside", "resumed", "finished"]
    assert str(damaged) in events[2]["cause"]
    assert events[3]["step"] == newest - 10
    assert events[3]["repeated_steps"] >= 10
    assert (run_dir / "checkpoints" / f"{step_dir(run_dir, newest).name}.damaged").is_dir()
    assert files_of(run_dir, STEPS) == files_of(tmp_path / "unbroken", STEPS)
    assert rows(run_dir) == rows(tmp_path / "unbroken")
    spent = goodput(lines_of(run_dir / "events.jsonl"), lines_of(run_dir / "metrics.jsonl"))
    assert spent.restarts == 1
    assert spent.lost["down"] >= 3
    assert spent.useful + sum(spent.lost.values()) == pytest.approx(spent.wall)
