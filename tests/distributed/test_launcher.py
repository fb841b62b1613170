"""The commands of the README, through DeepSpeed's own launcher. What they do in detail is tested in test_resume.py."""

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

from megagpt.checkpoint.store import CheckpointStore
from tests.distributed.processes import start, train_command
from tests.distributed.test_resume import rows, wait_until
from tests.tiny import run_words

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = Path(sys.executable).with_name("deepspeed")


def launch(words, log, *, module=False):
    """Start two processes as a person does."""
    port = str(20_000 + os.getpid() % 20_000)
    program = ["--module", "megagpt.train"] if module else [str(ROOT / "launch" / "pretrain.py")]
    command = [str(LAUNCHER), "--num_accelerators", "2", "--master_port", port, *program, *words]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)


@pytest.mark.slow
def test_a_run_is_stopped_by_the_scheduler_and_goes_on_with_the_same_command(tmp_path, tokens):
    """The scheduler's SIGTERM reaches `deepspeed` alone: it ends at once, and its ranks save without it."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    words = run_words(run_dir, tokens, "train.max_steps=400", "parallel.zero_stage=2", "log.progress=true")
    launcher = launch(words, log)
    try:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 2, seconds=200)
        below = psutil.Process(launcher.pid).children(recursive=True)
        launcher.terminate()
        assert launcher.wait(20) == -signal.SIGTERM
        assert psutil.wait_procs(below, timeout=100)[1] == [], log.read_text()
    finally:
        kill(launcher)
    (stopped_at,) = CheckpointStore(run_dir / "checkpoints").steps()
    assert stopped_at < 400
    assert f"saved at step {stopped_at}; the same command goes on from there" in log.read_text()
    resumed = start(train_command, 2, [*words, f"train.max_steps={stopped_at + 5}"], log=tmp_path / "resumed").finish()
    assert f"resuming at step {stopped_at}" in resumed
    assert [row["step"] for row in rows(run_dir)] == list(range(1, stopped_at + 6))
    plan = json.loads((run_dir / "plan.json").read_text())
    assert (plan["world_size"], plan["optimizer"]) == (2, "DeepSpeedZeroOptimizer")


def test_wrong_input_ends_the_launcher_with_one_message(tmp_path, tokens):
    log = tmp_path / "log"
    launcher = launch(
        run_words(tmp_path / "run", tokens, "train.global_batch_size=7", "train.micro_batch_size=7"), log, module=True
    )
    try:
        assert launcher.wait(200) == 2
    finally:
        kill(launcher)
    text = log.read_text()
    assert text.count("error: train.global_batch_size (7) must be a multiple") == 1
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def kill(launcher):
    """What is left of the launcher's session, where an assertion failed."""
    with suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
