"""A real run whose save fails in the middle: it goes on, says so, and ends with the weights of an unbroken one."""

from __future__ import annotations

import json

import pytest

from tests.distributed.faults import Fault, train_with_fault
from tests.distributed.processes import start, train_command
from tests.distributed.test_resume import files_of, published, run
from tests.tiny import run_words


@pytest.mark.parametrize("kind", ["async", pytest.param("sync", marks=pytest.mark.exhaustive)])
def test_a_run_goes_on_after_a_failed_save_and_names_what_it_did_not_take(kind, tmp_path, tokens):
    def words(name, *overrides):
        usual = ["checkpoint.save_every=4", "checkpoint.retry_after=2", f"checkpoint.asynchronous={kind == 'async'}"]
        return run_words(tmp_path / name, tokens, *usual, "log.progress=true", *overrides)

    whole = start(train_command, 1, words("whole"), log=tmp_path / "whole.log")
    codes, output = run(words("run", "train.max_steps=4"), tmp_path / "first.log", world_size=1)
    assert codes == [0], output
    in_the_way = tmp_path / "run" / "checkpoints" / "step_00000012"
    in_the_way.mkdir()  # a copy that was interrupted: no checkpoint, and not the program's to remove
    (in_the_way / "rank_00000.safetensors").write_bytes(b"half")
    (in_the_way.parent / "latest").write_text("global_step12")
    fault = Fault("no room in save", 0, 1, until=1)  # of step 8
    group = start(train_with_fault, 1, words("run"), fault, log=tmp_path / "second.log")
    output = group.finish()
    lines = output.splitlines()
    assert any(
        line.endswith("step_00000012: not taken: it has no manifest.json, so it is not complete") for line in lines
    )
    assert any("checkpoints/latest: not taken: it is no checkpoint of this program" in line for line in lines)
    assert any("resuming at step 4" in line for line in lines)
    failed, moved = (line for line in lines if line.startswith("warning: "))
    assert "No space left on device" in failed
    assert "it is step_00000012.damaged now" in moved
    history = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    events = [event for event in history if event["event"] != "saved"]
    names = ["started", "finished", "resumed", "save_failed", "set_aside", "finished"]
    assert [event["event"] for event in events] == names
    assert (events[3]["step"], events[3]["in_a_row"]) == (8, 1)
    assert events[4]["step"] == 12
    seen = published(tmp_path / "run")
    if kind == "sync":
        assert seen == [4, 10, 12], "tried again two steps later"
    assert (seen[0], seen[-1]) == (4, 12)  # asynchronous: at step 10 it may not be known yet
    aside = in_the_way.with_suffix(".damaged")
    assert [path.read_bytes() for path in aside.iterdir()] == [b"half"], "nothing of it is lost"
    whole.finish()
    assert files_of(tmp_path / "run", 12) == files_of(tmp_path / "whole", 12)
