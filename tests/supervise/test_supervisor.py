"""What starts a run again, with a small program in the launcher's place: when it does, when not, and what it leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from megagpt.errors import ConfigError, RunBusy, SystemFailed
from megagpt.supervise.leftovers import processes_of, save_grace
from megagpt.supervise.supervisor import Patience, Supervisor, cause_of
from megagpt.train.stop import ASKED, LAUNCHER_GONE, STOPPED

LAST_STEP = 90
# Does what the next line of a file says: saves a step, leaves a process behind, waits, ends.
LAUNCHER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
attempts = folder / "attempts"
number = len(attempts.read_text()) if attempts.exists() else 0
attempts.write_text("x" * (number + 1))
do = json.loads((folder / "plan.json").read_text())[number]
if "save" in do:
    step_dir = folder / "run" / "checkpoints" / f"step_{do['save']:08d}"
    step_dir.mkdir(parents=True)
    (step_dir / "manifest.json").touch()
if "say" in do:
    with (folder / "run" / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": do["say"], "step": 1, "cause": do.get("cause", "")}) + "\\n")
if "leave" in do:
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    left = subprocess.Popen([sys.executable, "-c", program])
    if do["leave"] == "stopped":
        left.send_signal(signal.SIGSTOP)
    (folder / "left").write_text(str(left.pid))
if "rank" in do:
    words = [sys.executable, str(folder / "rank.py"), str(folder), *map(str, do["rank"])]
    left = subprocess.Popen([*words, "--local_rank=0"])
    (folder / "left").write_text(str(left.pid))
if "wait" in do:
    (folder / "waits").touch()
    time.sleep(do["wait"])
if "signal" in do:
    os.kill(os.getpid(), do["signal"])
sys.exit(do["code"])
"""


# A rank: its file grows by so many pieces, then nothing is seen for so many seconds, then the checkpoint is there.
RANK = """
import sys, time
from pathlib import Path
folder, pieces, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
staging = folder / "run" / "checkpoints" / "step_00000007.tmp"
staging.mkdir(parents=True)
(folder / "waits").touch()
for _ in range(pieces):
    with (staging / "rank").open("ab") as file:
        file.write(b"x" * 1000)
    time.sleep(0.5)
time.sleep(seconds)
(staging / "manifest.json").touch()
staging.rename(staging.with_suffix(""))
"""


DONE = {"save": LAST_STEP, "code": 0}


@pytest.fixture
def supervised(tmp_path):
    """Run a plan; exit code, starts, what was said, events."""

    def run(*plan, restarts=2, grace=0.3, command=None, heard=None):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        (tmp_path / "rank.py").write_text(RANK)
        said: list[str] = []
        words = [sys.executable, "-c", LAUNCHER, str(tmp_path)]

        def say(line):
            said.append(line)
            if heard is not None:
                heard(line)

        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        try:
            code = Supervisor(
                tmp_path / "run",
                lambda: command(words) if command is not None else words,
                os.environ,
                Patience(restarts, first_wait_seconds=0.01, grace_seconds=grace),
                say,
                LAST_STEP,
            ).run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        history = tmp_path / "run" / "events.jsonl"
        events = [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []
        attempts = tmp_path / "attempts"
        return code, len(attempts.read_text()) if attempts.exists() else 0, said, events

    return run


def test_a_failure_is_followed_by_a_start_and_the_history_tells_it(supervised):
    code, starts, said, events = supervised({"save": 4, "code": 1}, {"signal": 9, "code": 0}, DONE)
    assert (code, starts) == (0, 3)
    assert [(event["event"], event["step"], event["exit_code"]) for event in events] == [
        ("failed", 4, 1),
        ("failed", 4, -9),
    ]
    assert events[1]["cause"] == "the launcher was ended by SIGKILL"
    assert "starting again in 0 s from step 4 (1 of 2 without a new checkpoint)" in said[0]


def test_it_is_given_up_after_failures_without_a_new_checkpoint_not_after_all(supervised):
    saving = [{"save": step, "code": 1} for step in range(1, 6)]
    code, starts, said, _ = supervised(*saving, {"code": 1}, {"code": 1}, {"code": 1}, restarts=2)
    assert (code, starts) == (1, 7)  # the fifth, which saved, is the first of three failures in a row
    assert "given up after 3 failures in a row without a new checkpoint" in said[-1]


@pytest.mark.parametrize("final", [2, 3])
def test_what_would_happen_again_is_not_tried_again(final, supervised):
    assert supervised({"code": final})[:2] == (final, 1)


@pytest.mark.parametrize(
    "killed",
    [
        {"code": 0},
        {"save": 5, "code": 0},
        {"say": "hung", "code": 0},
        {"say": "stopped", "cause": LAUNCHER_GONE, "code": 0},
    ],
)
def test_a_run_that_is_not_done_is_started_again_whatever_the_launcher_says(killed, supervised):
    """`deepspeed` ends with 0 where the launcher of a host was killed."""
    code, starts, said, events = supervised(killed, DONE)
    assert (code, starts) == (0, 2)
    assert "the run is not done: a process of the launcher was killed; starting again" in said[0]
    assert events[-1]["exit_code"] == 0


def test_a_run_that_never_gets_done_is_given_up_with_a_code_that_says_so(supervised):
    assert supervised(*[{"code": 0}] * 9, restarts=1)[:2] == (1, 2)


@pytest.mark.parametrize("end", [DONE, {"say": "stopped", "cause": ASKED, "code": 0}, {"say": "finished", "code": 0}])
def test_a_run_that_says_that_it_is_over_is_over(end, supervised):
    assert supervised(end)[:2] == (0, 1)


@pytest.mark.parametrize("code", [RunBusy.exit_code, SystemFailed.exit_code])
def test_a_busy_folder_and_a_failing_system_are_tried_again(code, supervised):
    assert supervised({"code": code}, DONE)[:2] == (0, 2)


def raising(*errors):
    """A command that cannot be made so often; then it can."""
    left = list(errors)

    def command(words):
        if left:
            raise left.pop(0)
        return words

    return command


def test_too_few_hosts_for_a_while_are_waited_for_like_any_other_failure(supervised):
    few = SystemFailed("too few hosts answer: none")
    code, starts, said, events = supervised({"save": 5, "code": 1}, DONE, command=raising(few, few))
    assert (code, starts) == (0, 2)
    assert "too few hosts answer: none; starting again in 0 s from the beginning (1 of 2" in said[0]
    assert [(event["exit_code"], event["cause"]) for event in events[:2]] == [(7, str(few))] * 2
    code, starts, said, events = supervised(command=raising(*[few] * 9), restarts=1)
    assert (code, len(events)) == (7, 5)
    assert "given up after 2 failures in a row without a new checkpoint; the last one: too few hosts" in said[-1]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT, errno.EAGAIN])
def test_a_launcher_that_cannot_be_started_just_now_is_tried_again(number, supervised):
    code, starts, said, _ = supervised(DONE, command=raising(OSError(number, os.strerror(number))))
    assert (code, starts) == (0, 1)
    assert os.strerror(number) in said[0]


def test_a_wrong_configuration_is_not_tried_again(supervised):
    with pytest.raises(ConfigError, match="not of the form"):
        supervised(DONE, command=raising(ConfigError("hosts:1: not of the form")))


@pytest.mark.parametrize("when", ["before the next start", "at the end"])
def test_a_folder_that_cannot_be_looked_into_for_a_while_ends_nothing(when, supervised, tmp_path):
    checkpoints, away = tmp_path / "run" / "checkpoints", tmp_path / "away"

    starts_before = []

    def unmount(words):
        starts_before.append(words)
        if len(starts_before) == 2:
            checkpoints.rename(away)
            checkpoints.symlink_to("gone")
        return words

    def mount_again(line):
        if checkpoints.is_symlink() and "link to gone" in line and (when == "at the end" or "starting again" in line):
            checkpoints.unlink()
            away.rename(checkpoints)

    code, starts, said, events = supervised(
        {"save": 5, "code": 1}, {"code": 1}, DONE, command=unmount, heard=mount_again, restarts=3
    )
    assert code == 0
    assert starts == 3
    assert any("is a link to gone, which is gone; is its disk mounted?" in line for line in said)
    assert {event["step"] for event in events} == {5}


def test_checkpoints_that_were_there_and_are_not_are_no_reason_to_start_from_the_beginning(supervised, tmp_path):
    checkpoints, away = tmp_path / "run" / "checkpoints", tmp_path / "away"

    def heard(line):
        if "from step 5 (1 of 3" in line:
            checkpoints.rename(away)
        elif away.exists():
            away.rename(checkpoints)

    code, starts, said, _ = supervised({"save": 5, "code": 1}, DONE, heard=heard, restarts=3)
    assert (code, starts) == (0, 2)
    assert "step 5 was here, and now there is no checkpoint" in said[1]


@pytest.mark.parametrize("state", ["sleeping", "stopped"])
def test_nothing_of_a_failed_start_is_left_when_the_next_one_comes(state, supervised, tmp_path):
    code, _, said, _ = supervised({"leave": state, "code": 1}, DONE)
    assert code == 0
    pid = int((tmp_path / "left").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert f"killing 1 processes that the launcher left behind: [{pid}]" in said


def ask_to_stop(tmp_path, number=signal.SIGTERM):
    until = time.monotonic() + 30
    while not (tmp_path / "waits").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def test_a_rank_that_still_saves_after_a_stop_is_let_finish(supervised, tmp_path):
    """Its save takes longer than the grace, which counts anew while its file grows."""
    threading.Thread(target=ask_to_stop, args=(tmp_path,)).start()
    code, starts, said, _ = supervised({"rank": [14, 0], "wait": 60, "code": 0}, grace=3)
    assert (code, starts) == (0, 1), said
    assert (tmp_path / "run" / "checkpoints" / "step_00000007").is_dir()
    assert "waiting for 1 processes to save and end; killed after 3 s without progress" in said


@pytest.mark.exhaustive
def test_a_rank_whose_save_does_not_get_on_is_killed(supervised, tmp_path):
    threading.Thread(target=ask_to_stop, args=(tmp_path,)).start()
    code, starts, said, _ = supervised({"rank": [1, 600], "wait": 60, "code": 0}, grace=3)
    assert (code, starts) == (STOPPED, 1)
    assert f"killing 1 processes that the launcher left behind: [{(tmp_path / 'left').read_text()}]" in said


def test_a_second_ctrl_c_waits_no_longer(supervised, tmp_path):
    def ask_twice():
        ask_to_stop(tmp_path, signal.SIGINT)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask_twice).start()
    began = time.monotonic()
    assert supervised({"rank": [1, 600], "wait": 60, "code": 0}, grace=500)[0] == STOPPED
    assert time.monotonic() - began < 60


def test_ranks_may_save_as_long_as_their_own_watch_lets_them():
    assert save_grace(1800) == 2100
    assert save_grace(0) == float("inf")


@pytest.mark.parametrize(("saves", "expected"), [(True, 0), (False, STOPPED)])
def test_a_stop_is_passed_on_and_nothing_is_started_again(saves, expected, supervised, tmp_path):
    def stop():
        until = time.monotonic() + 30
        while not (tmp_path / "waits").exists() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    plan = {"wait": 60, "code": 0} | ({"save": 3} if saves else {})
    started_at = time.monotonic()
    code, starts, _, events = supervised(plan, {"code": 0})
    assert (code, starts, events) == (expected, 1, [])
    assert time.monotonic() - started_at < 30


def test_waits_grow_up_to_a_limit():
    patience = Patience(9, first_wait_seconds=5, longest_wait_seconds=60)
    assert [patience.wait_seconds(failures) for failures in (1, 2, 3, 4, 5, 6)] == [5, 10, 20, 40, 60, 60]


@pytest.mark.parametrize(
    ("code", "words"),
    [(-15, "SIGTERM"), (247, "a process was ended by SIGKILL"), (137, "a process was ended by SIGKILL"),
     (5, "another process trains"), (1, "traceback"), (77, "exit code 77")],
)  # fmt: skip
def test_an_exit_code_is_put_into_words(code, words):
    assert words in cause_of(code)


def test_processes_of_a_session_are_found_also_when_their_parent_has_gone():
    inner = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    parent = subprocess.Popen([sys.executable, "-c", inner], start_new_session=True)
    assert parent.wait(30) == 0
    (orphan,) = processes_of(parent.pid)
    orphan.kill()
