"""A run's history, and how its time is accounted for."""

from __future__ import annotations

import json
import os
import time

import pytest

from megagpt.train.events import goodput, log_event, log_start, tell_damage
from megagpt.train.metrics import CutOff, JsonlSink
from megagpt.train.state import TrainState


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


def events_of(run_dir):
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_an_event_behind_one_that_was_cut_stands_in_a_line_of_its_own(tmp_path):
    log_event(tmp_path, "started", 0)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": "2026')
    log_event(tmp_path, "saved", 5)
    lines = (tmp_path / "events.jsonl").read_bytes().split(b"\n")
    assert lines[1] == b'{"time": "2026'
    assert [json.loads(lines[place])["event"] for place in (0, 2)] == ["started", "saved"]


def test_damaged_and_missing_rows_are_told_in_the_history(tmp_path):
    log_event(tmp_path, "started", 0)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    log_event(tmp_path, "saved", 5)
    found = (tmp_path / "events.jsonl").read_bytes()
    metrics, said = tmp_path / "metrics.jsonl", []
    metrics.write_bytes(b'{"step": 1}\n{"step": 2}\n\xff\n{"step": 5}\n')
    sink = JsonlSink(metrics, 5, said.append)
    sink.close()
    tell_damage(tmp_path, TrainState(step=5, metric_rows=5), sink, said.append)
    assert (tmp_path / "events.jsonl.damaged").read_bytes() == found
    history = events_of(tmp_path)
    assert [event["event"] for event in history] == ["started", "saved", "rows_damaged", "rows_damaged", "rows_missing"]
    assert [(event["file"], event["lines"], event["kept_as"]) for event in history[2:4]] == [
        ("metrics.jsonl", 1, "metrics.jsonl.damaged"), ("events.jsonl", 1, "events.jsonl.damaged")
    ]  # fmt: skip
    assert (history[4]["expected"], history[4]["found"]) == (5, 3)
    assert f"warning: {metrics}: 3 rows up to step 5, and the checkpoint counts 5: 2 are lost" in said[2]


@pytest.mark.parametrize("recorded", [None, 2])
def test_a_run_whose_rows_are_all_there_is_told_nothing(recorded, tmp_path):
    log_event(tmp_path, "saved", 5)
    before, said = (tmp_path / "events.jsonl").read_bytes(), []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 5}\n{"step": 6}\n')
    sink = JsonlSink(tmp_path / "metrics.jsonl", 5, said.append)
    sink.close()
    tell_damage(tmp_path, TrainState(step=5, metric_rows=recorded), sink, said.append)
    assert said == []
    assert (tmp_path / "events.jsonl").read_bytes() == before
