"""A run's history, and how its time is accounted for."""

from __future__ import annotations

import json
import os
import time

import pytest

from megagpt.train.events import goodput, log_event, log_start
from megagpt.train.metrics import CutOff, JsonlSink


def row(step, seconds):
    return {"step": step, "loss": 5.0, "step_seconds": seconds}


def test_what_a_killed_process_had_done_since_its_checkpoint_is_told_at_the_next_start(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    sink = JsonlSink(metrics, -1, print)
    for step in range(1, 7):
        sink.write(row(step, 0.5))
    sink.write({"step": 6, "val_loss": 4.0, "val_seconds": 2.0})
    sink.close()
    ended_at = time.time() - 3600
    os.utime(metrics, (ended_at, ended_at))
    sink = JsonlSink(metrics, 4, print)
    sink.close()
    assert (sink.cut_off.steps, sink.cut_off.seconds) == (2, 1.0)
    log_start(tmp_path, 4, sink.cut_off, world_size=2)
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["event"], event["step"], event["world_size"]) == ("resumed", 4, 2)
    assert (event["repeated_steps"], event["repeated_seconds"]) == (2, 1.0)
    # The test's own process began before it: between an hour and an hour less what the tests have taken so far.
    assert 0 < event["down_seconds"] <= 3600
    assert event["start_seconds"] >= 0


def test_a_first_start_says_nothing_of_a_time_before(tmp_path):
    log_start(tmp_path, 0, CutOff(), world_size=1)
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event["event"] == "started"
    assert not {"down_seconds", "repeated_steps"} & event.keys()


def test_every_second_between_the_first_start_and_the_last_event_has_a_cause():
    events = [
        {"time": "2026-01-01T00:00:10.000Z", "event": "started", "step": 0, "start_seconds": 10.0},
        {"time": "2026-01-01T00:01:00.000Z", "event": "saved", "step": 40, "seconds": 2.0},
        {"time": "2026-01-01T00:01:40.000Z", "event": "failed", "step": 40, "exit_code": 1, "cause": "x"},
        {
            "time": "2026-01-01T00:02:00.000Z", "event": "resumed", "step": 40,
            "start_seconds": 8.0, "down_seconds": 13.0, "repeated_seconds": 9.0, "repeated_steps": 9,
        },
        {"time": "2026-01-01T00:03:20.000Z", "event": "finished", "step": 100},
    ]  # fmt: skip
    rows = [row(step, 1.25) for step in range(1, 101)] + [{"step": 100, "val_loss": 4.0, "val_seconds": 6.0}]
    found = goodput(events, rows)
    assert found.wall == pytest.approx(200.0)
    assert found.useful == pytest.approx(125.0)
    assert found.restarts == 1
    assert found.lost == pytest.approx(
        {"down": 13, "starting": 18, "steps done again": 9, "saving": 2, "validation": 6, "other": 27}
    )
    assert found.useful + sum(found.lost.values()) == pytest.approx(found.wall)
    assert found.fraction == pytest.approx(0.625)


def test_a_history_without_times_is_no_account(tmp_path):
    log_event(tmp_path, "started", 0)
    assert goodput([json.loads((tmp_path / "events.jsonl").read_text())], [row(1, 1.0)]) is None
