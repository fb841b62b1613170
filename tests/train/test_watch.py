"""Deadlines of one process. What several do together is in tests/distributed/test_watch.py."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest

from megagpt.config.schema import WatchSection
from megagpt.errors import TrainingHung
from megagpt.train.watch import STEP_FLOOR_SECONDS, Watch, collective_timeout, save_timeout


def watching(tmp_path, **settings):
    return Watch(WatchSection(**settings), tmp_path / "run", 0, end=lambda code: None)


def steps(watch, n, seconds=0.0):
    for step in range(1, n + 1):
        watch.enter("step", step, "reading data")
        time.sleep(seconds)
        watch.enter("step", step, "computing")
    watch.enter("eval", n)


def test_a_steps_deadline_is_learned_and_never_below_the_floor(tmp_path):
    watch = watching(tmp_path, startup_seconds=777)
    steps(watch, 3)
    assert watch.deadline("step") == 777
    steps(watch, 20, seconds=0.001)
    assert watch.deadline("step") == STEP_FLOOR_SECONDS
    watch._step_seconds.extend([40.0] * 64)
    assert watch.deadline("step") == 400


def test_a_steps_deadline_that_is_set_holds_after_the_first_step(tmp_path):
    watch = watching(tmp_path, startup_seconds=777, step_seconds=30)
    assert watch.deadline("step") == 777  # what the first step compiles is part of the start
    steps(watch, 1)
    assert watch.deadline("step") == 30
    assert watching(tmp_path, step_seconds=0).deadline("step") == 0


def test_parts_of_a_step_share_its_deadline_and_phases_have_their_own(tmp_path):
    watch = watching(tmp_path, save_seconds=1, eval_seconds=2)
    assert (watch.deadline("save"), watch.deadline("eval")) == (1, 2)
    watch.enter("step", 1, "reading data")
    began = watch._now[3]
    time.sleep(0.01)
    watch.enter("step", 1, "computing")
    assert watch._now[3] == began
    watch.enter("save", 1)
    assert watch._now[3] > began


@pytest.mark.parametrize("phase", ["startup", "step", "save", "eval"])
def test_a_phase_past_its_deadline_ends_the_process_with_the_stacks_written(phase, tmp_path, capsys):
    """A process alone, whose main thread is somewhere in this function."""
    ended = threading.Event()
    codes = []

    def end(code):
        codes.append(code)
        ended.set()

    settings = WatchSection(**{f"{phase}_seconds": 0.6})
    (tmp_path / "run").mkdir()
    with Watch(settings, tmp_path / "run", 0, end=end) as watch:
        if phase != "startup":
            watch._step_seconds.append(0.1)  # the start is over
            watch.enter(phase, 7)
        began = time.monotonic()
        assert ended.wait(6)
        assert time.monotonic() - began < 0.6 + 5
    assert codes[0] == TrainingHung.exit_code
    assert f"(limit 1 s, watch.{phase}_seconds)" in capsys.readouterr().err
    stacks = (tmp_path / "run" / "stacks" / "rank_00000.txt").read_text()
    assert "test_watch.py" in stacks
    assert '"event": "hung"' in (tmp_path / "run" / "events.jsonl").read_text()


def test_the_process_group_gives_up_after_every_deadline():
    usual = timedelta(minutes=30)
    assert collective_timeout(WatchSection(), usual) == timedelta(seconds=1860)
    assert collective_timeout(WatchSection(save_seconds=7200), usual) == timedelta(seconds=7260)
    assert collective_timeout(WatchSection(eval_seconds=0), usual) > timedelta(days=1)


def test_the_group_of_saves_gives_up_after_their_deadline_and_never_without_one():
    assert save_timeout(WatchSection()) == timedelta(seconds=1860)
    assert save_timeout(WatchSection(save_seconds=7200)) == timedelta(seconds=7260)
    assert save_timeout(WatchSection(save_seconds=0)) > timedelta(days=1)


def test_a_thread_that_writes_past_its_deadline_ends_the_process_though_the_main_one_goes_on(tmp_path, capsys):
    ended, codes = threading.Event(), []

    def end(code):
        codes.append(code)
        ended.set()

    def write(watch):
        with watch.writing(40):
            ended.wait(20)

    (tmp_path / "run").mkdir()
    with Watch(WatchSection(save_seconds=0.6), tmp_path / "run", 0, end=end) as watch:
        thread = threading.Thread(target=write, args=(watch,))
        thread.start()
        step, until = 40, time.monotonic() + 15
        while not ended.is_set() and time.monotonic() < until:
            step += 1
            watch.enter("step", step)
            time.sleep(0.02)
        thread.join()
    assert codes[0] == TrainingHung.exit_code
    told = capsys.readouterr().err
    assert "error: save at step 40 is not written after " in told
    assert "(limit 1 s, watch.save_seconds)" in told
    assert "rank 0 did not arrive: writing, at " in told


def test_a_save_that_is_written_in_time_and_one_without_a_deadline_end_nothing(tmp_path):
    codes: list[int] = []
    for settings in (WatchSection(save_seconds=30), WatchSection(save_seconds=0)):
        with Watch(settings, tmp_path / "run", 0, end=codes.append) as watch:
            with watch.writing(40):
                time.sleep(0.7)
            watch.enter("step", 41)
            time.sleep(0.6)
    assert codes == []
