"""What asks a run to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megagpt.train.stop import ASKED, LAUNCHER_GONE, StopRequest

DEEPSPEED = Path(sys.executable).with_name("deepspeed")
RANK = """
import json, sys, time
from pathlib import Path
import psutil
from megagpt.train.stop import StopRequest, look_at_deepspeed

where = Path(sys.argv[-1])
above = {("launch.py" if "deepspeed.launcher.launch" in one.cmdline() else "deepspeed"): one.pid
         for one in psutil.Process().parents()[:2]}
(where / "pids.tmp").write_text(json.dumps(above))
(where / "pids.tmp").rename(where / "pids")
while not (where / "go").exists():
    time.sleep(0.01)
request = StopRequest(look_at_deepspeed())
(where / "said.tmp").write_text(json.dumps([request.requested, request.cause]))
(where / "said.tmp").rename(where / "said")
"""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def request_to_stop():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopRequest(lambda: False)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_to_save_and_stop(number, request_to_stop):
    assert not request_to_stop.requested
    signal.raise_signal(number)
    assert request_to_stop.requested


def test_a_second_ctrl_c_interrupts_at_once(request_to_stop):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def read_when_there(path):
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.01)
    return json.loads(path.read_text())


@pytest.mark.parametrize("killed", ["deepspeed", "launch.py", None])
def test_a_launcher_that_has_gone_before_a_rank_looks_is_seen_too(killed, tmp_path):
    """It takes a rank minutes to load a large model; nobody would ever stop it."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    words = [DEEPSPEED, "--num_accelerators", "1", script, tmp_path]
    deepspeed = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pids = read_when_there(tmp_path / "pids")
    if killed is not None:
        psutil.Process(pids[killed]).kill()
        deepspeed.wait(60)  # of itself, where launch.py has gone
    (tmp_path / "go").touch()
    assert read_when_there(tmp_path / "said") == [killed is not None, LAUNCHER_GONE if killed else ASKED]
    deepspeed.wait(60)


def test_a_process_whose_shell_has_gone_is_not_asked_to_stop(tmp_path):
    """As after `ssh host 'nohup python launch/pretrain.py ... &'`."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    background = f"'{sys.executable}' '{script}' '{tmp_path}' &"
    subprocess.run(["sh", "-c", background], start_new_session=True, check=True)
    read_when_there(tmp_path / "pids")
    (tmp_path / "go").touch()
    assert read_when_there(tmp_path / "said") == [False, ASKED]
