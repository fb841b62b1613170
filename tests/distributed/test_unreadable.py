"""A checkpoint that one rank cannot read is not damaged: nothing is set aside, and the same command goes on later."""

from __future__ import annotations

import json

import pytest

from megagpt.train.events import EVENTS
from tests.distributed.faults import Fault, train_with_fault
from tests.distributed.processes import start, train_command
from tests.distributed.read_jobs import SIGHTS, train_seeing, verify_in_every_way
from tests.distributed.test_resume import files_of, published, run
from tests.tiny import run_words


def events_of(run_dir, *names):
    rows = [json.loads(line) for line in (run_dir / EVENTS).read_text().splitlines()]
    return [row for row in rows if row["event"] in names]


@pytest.mark.parametrize(
    ("sight", "words"),
    [
        ("ENOENT", "rank 1: {step_dir}: no manifest.json"),
        *(
            pytest.param(*one, marks=pytest.mark.exhaustive)
            for one in (("EIO", "Input/output error"), ("flipped bit", "rank 1 read other bytes"))
        ),
    ],
)
def test_what_one_rank_cannot_read_is_not_given_up_and_the_start_is_to_be_tried_again(sight, words, tmp_path, tokens):
    run_dir = tmp_path / "run"
    usual = ["checkpoint.save_every=2", "checkpoint.fall_back=true"]
    start(train_command, 2, run_words(run_dir, tokens, *usual, "train.max_steps=6"), log=tmp_path / "1.log").finish()
    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    further = run_words(run_dir, tokens, *usual, "train.max_steps=8")
    group = start(train_seeing, 2, further, sight, 1, log=tmp_path / "2.log")
    assert group.wait() == [7, 7], group.output()
    assert words.format(step_dir=run_dir / "checkpoints" / "step_00000006") in group.output()
    assert "rank 1" in group.output()
    assert "step_00000006" in group.output()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before
    codes, output = run(further, tmp_path / "3.log")
    assert codes == [0, 0], output
    assert published(run_dir) == [4, 6, 8]
    assert [event["step"] for event in events_of(run_dir, "resumed", "set_aside")] == [6]


def test_only_what_two_ranks_have_read_and_found_wrong_is_damage(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    start(verify_in_every_way, 2, folder, log=tmp_path / "log").finish(120)
    told, other = (json.loads((folder.parent / f"told_{rank}.json").read_text()) for rank in range(2))
    assert told == other, "all ranks hear the same"
    assert told.pop("whole")[0] == "whole"
    for name in ("damaged", "damaged manifest"):
        kind, message, code = told.pop(name)
        assert (kind, code) == ("CheckpointDamaged", "2"), message
        assert ("rank_00001.safetensors: damaged" if name == "damaged" else "manifest.json: damaged") in message
        assert "Remove" in message
    assert len(told) == 2 * len(SIGHTS)
    for name, (kind, message, code) in told.items():
        assert (kind, code) == ("CheckpointUnreadable", "7"), f"{name}: {message}"
        assert f"rank {name[-1]}" in message
        assert "step_00000010" in message


@pytest.mark.exhaustive
def test_a_rank_that_sees_a_newer_checkpoint_than_the_main_one_keeps_the_run_from_going_on_before_it(tmp_path, tokens):
    """The main rank's view of a shared folder may be old, even empty: step 0 again would be the worst of it."""
    run_dir = tmp_path / "run"
    words = [*run_words(run_dir, tokens, "checkpoint.save_every=2")]
    start(train_command, 2, [*words, "train.max_steps=6"], log=tmp_path / "1.log").finish()
    group = start(train_with_fault, 2, words, Fault("sees no checkpoint", 0, 1), log=tmp_path / "2.log")
    assert group.wait() == [7, 7], group.output()
    assert "step_00000006: rank 1 sees it and rank 0 does not: it sees no checkpoint" in group.output()
    assert published(run_dir) == [2, 4, 6]


@pytest.mark.parametrize("fault", ["no room for config.yaml", pytest.param("no lock", marks=pytest.mark.exhaustive)])
def test_a_disk_that_fails_at_the_start_ends_it_with_an_exit_code_that_is_tried_again(fault, tmp_path, tokens):
    words = run_words(tmp_path / "run", tokens)
    group = start(train_with_fault, 1, words, Fault(fault, 0, 1), log=tmp_path / "log")
    assert group.wait() == [7], group.output()
    assert ("No space left on device" if "room" in fault else "No locks available") in group.output()
    assert "Traceback" not in group.output()


@pytest.mark.exhaustive
@pytest.mark.parametrize("fall_back", [True, False])
def test_a_rollback_to_a_damaged_checkpoint_falls_back_as_a_start_does(fall_back, tmp_path, tokens):
    run_dir = tmp_path / "run"
    usual = ["train.max_steps=60", "checkpoint.save_every=8", "optim.schedule=constant", "optim.lr=5e-3"]
    usual += ["watch.spike_window=24", "checkpoint.keep_last=9", "watch.on_spike=rollback", "log.progress=true"]
    words = run_words(run_dir, tokens, *usual, f"checkpoint.fall_back={fall_back}", "checkpoint.asynchronous=false")
    faults = [Fault("noise", -1, 44, until=44), Fault("damages the newest checkpoint", 0, 45, until=45)]
    group = start(train_with_fault, 2, words, *faults, log=tmp_path / "log")
    codes = group.wait()
    if not fall_back:
        assert codes == [2, 2], group.output()
        assert "step_00000040/rank_00000.safetensors: damaged" in group.output()
        assert 40 in published(run_dir)
        return
    assert codes == [0, 0], group.output()
    assert "back to step 32; batches 32 to 44 are passed over" in group.output()
    assert [event["step"] for event in events_of(run_dir, "set_aside")] == [40]
    assert published(run_dir) == [8, 16, 24, 32, 40, 48, 56, 60]
    assert (run_dir / "checkpoints" / "step_00000040.damaged").is_dir()
    assert files_of(run_dir, 60)
