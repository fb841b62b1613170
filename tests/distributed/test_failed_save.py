"""A real run whose save fails in the middle: it goes on, says so, and ends with the weights of an unbroken one."""

from __future__ import annotations

import json

import pytest

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
    in_the_way = tmp_path / "run" / "checkpoints" / "step_00000008"
    in_the_way.mkdir()  # a copy that was interrupted: no checkpoint, and not the program's to remove
    (in_the_way.parent / "latest").write_text("global_step8")
    codes, output = run(words("run"), tmp_path / "second.log", world_size=1)
    assert codes == [0], output
    lines = output.splitlines()
    assert any(
        line.endswith("step_00000008: not taken: it has no manifest.json, so it is not complete") for line in lines
    )
    assert any("checkpoints/latest: not taken: it is no checkpoint of this program" in line for line in lines)
    assert any("resuming at step 4" in line for line in lines)
    (warning,) = (line for line in lines if line.startswith("warning: "))
    assert "step_00000008: exists already" in warning
    history = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    events = [event for event in history if event["event"] != "saved"]
    assert [event["event"] for event in events] == ["started", "finished", "resumed", "save_failed", "finished"]
    assert (events[3]["step"], events[3]["in_a_row"]) == (8, 1)
    seen = published(tmp_path / "run")
    if kind == "sync":
        assert seen == [4, 10, 12], "tried again two steps later"
    assert (seen[0], seen[-1]) == (4, 12)  # asynchronous: at step 10 it may not be known yet
    assert list(in_the_way.iterdir()) == []
    whole.finish()
    assert files_of(tmp_path / "run", 12) == files_of(tmp_path / "whole", 12)
