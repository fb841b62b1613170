"""Stopped, killed, started again: the run is the one that nobody touched. Real processes, real signals."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.data.indexed import TokenFileWriter
from tests.checkpoint.calls import place_of, standing_in
from tests.distributed.faults import Fault, train_with_fault
from tests.distributed.processes import start, train_command
from tests.distributed.runs import metric_rows as rows
from tests.distributed.runs import step_dir
from tests.tiny import run_words


def run(words, log, world_size=2):
    """Exit codes of all ranks, and what they printed."""
    group = start(train_command, world_size, words, log=log)
    return group.wait(), group.output()


def files_of(run_dir, step):
    """Name -> bytes of a checkpoint's tensors."""
    return {path.name: path.read_bytes() for path in step_dir(run_dir, step).glob("*.safetensors")}


def published(run_dir):
    return CheckpointStore(run_dir / "checkpoints").steps()


@pytest.fixture(scope="module")
def command(tokens, val_tokens):
    """The words of a run with dropout, validation and checkpoints at steps 6 and 12."""

    def make(run_dir, *overrides):
        usual = ["checkpoint.save_every=6", "model.dropout=0.1", f"data.val={val_tokens}", "eval.every=4"]
        return run_words(run_dir, tokens, *usual, "eval.sequences=8", *overrides)

    return make


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command):
    """A complete run of 12 steps in fp32 under ZeRO-1. Tests copy it."""
    folder = tmp_path_factory.mktemp("finished")
    run_dir = folder / "run"
    codes, output = run(command(run_dir), folder / "log")
    assert codes == [0, 0], output
    return run_dir


@pytest.mark.parametrize(
    ("dtype", "stage", "optimizer"),
    [
        ("fp32", 1, "adamw"),
        ("fp32", 3, "adamw"),
        ("bf16", 1, "adamw"),
        ("bf16", 3, "adamw"),
        ("fp32", 0, "muon"),
        ("bf16", 1, "muon"),
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_unbroken_one(dtype, stage, optimizer, tmp_path, command):
    """With dropout: random numbers follow from seed, step and rank."""
    run_dir = tmp_path / "run"
    words = command(run_dir, f"train.dtype={dtype}", f"parallel.zero_stage={stage}", f"optim.name={optimizer}")
    assert run(words, tmp_path / "log")[0] == [0, 0]
    weights_and_moments, metrics = files_of(run_dir, 12), rows(run_dir)
    shutil.rmtree(step_dir(run_dir, 12))  # as if it had been killed before the last save
    codes, output = run(words, tmp_path / "log2")
    assert codes == [0, 0], output
    assert files_of(run_dir, 12) == weights_and_moments
    assert rows(run_dir) == metrics
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in metrics if "val_loss" in row] == [0, 4, 8, 12]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_unbroken_one(tmp_path, command):
    """SIGKILL to all processes: at a random moment, and while a checkpoint is being written."""
    slow = ["checkpoint.save_every=1", "checkpoint.keep_last=2", "train.max_steps=30", "parallel.zero_stage=2"]
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    group = start(train_command, 2, command(unbroken, *slow), log=tmp_path / "unbroken.log")
    choose = random.Random(5)
    reached = []
    for attempt, in_save in enumerate([True, False, True]):
        victim = start(train_command, 2, command(killed, *slow), log=tmp_path / f"killed{attempt}.log")
        first = published(killed)[-1] if published(killed) else 0
        wait_until(lambda first=first: published(killed) and published(killed)[-1] >= first + choose.randint(3, 6))
        if in_save:
            wait_until(lambda: list((killed / "checkpoints").glob("step_*.tmp")))
        victim.signal(signal.SIGKILL)
        for step in published(killed):
            verify_checkpoint(step_dir(killed, step))
        reached.append(published(killed)[-1])
    codes, output = run(command(killed, *slow), tmp_path / "last.log")
    assert codes == [0, 0], output
    group.finish()
    assert reached == sorted(reached)
    assert reached[0] < 30
    assert files_of(killed, 30) == files_of(unbroken, 30)
    assert rows(killed) == rows(unbroken)
    assert published(killed) == [29, 30]
    assert not list((killed / "checkpoints").glob("*.tmp"))


def wait_until(condition, seconds=180.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.002)


def test_sigterm_saves_exits_0_and_the_same_command_goes_on(tmp_path, command):
    run_dir = tmp_path / "run"
    words = command(run_dir, "train.max_steps=100", "checkpoint.save_every=0", "log.progress=true")
    group = start(train_command, 2, words, log=tmp_path / "log")
    wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 3)
    os.kill(group.processes[1].pid, signal.SIGTERM)  # one rank alone is told; all must learn of it
    assert group.wait() == [0, 0], group.output()
    (stopped_at,) = published(run_dir)
    assert 0 < stopped_at < 100
    assert f"saved at step {stopped_at}" in group.output()
    verify_checkpoint(step_dir(run_dir, stopped_at))
    codes, output = run([*words, f"train.max_steps={stopped_at + 2}", "optim.warmup_steps=1"], tmp_path / "log2")
    assert codes == [0, 0], output
    assert published(run_dir) == [stopped_at, stopped_at + 2]
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["started", "saved", "stopped", "resumed", "saved", "finished"]
    assert events[3]["changed"] == {"optim.warmup_steps": [3, 1], "train.max_steps": [100, stopped_at + 2]}
    assert "changed since the checkpoint: optim.warmup_steps from 3 to 1" in (tmp_path / "log2").read_text()


@pytest.mark.parametrize("layout", [[], pytest.param(["parallel.pipeline=2"], marks=pytest.mark.exhaustive)])
def test_a_stop_saves_that_very_step_and_before_any_evaluation(layout, tmp_path, command):
    """The signal comes while step 4 is computed, after which an evaluation is due."""
    run_dir = tmp_path / "run"
    words = command(run_dir, "checkpoint.save_every=0", "log.progress=true", *layout)
    stopped = start(train_with_fault, 2, words, Fault("asked to stop in step", 1, 4), log=tmp_path / "log").finish()
    assert published(run_dir) == [4]
    assert [row["step"] for row in rows(run_dir) if "val_loss" in row] == [0]
    assert "asked to stop: saved at step 4; the same command goes on from there" in stopped
    assert "step 4: validation left out because of the stop" in stopped
    words = [*words, "train.max_steps=8"]
    ended = start(train_with_fault, 2, words, Fault("asked to stop in step", 1, 4), log=tmp_path / "log2").finish()
    assert published(run_dir) == [4, 8]
    assert "asked to stop: saved at step 8, the last one" in ended
    assert [row["step"] for row in rows(run_dir) if "val_loss" in row] == [0, 8], "it cannot be made up for later"
    events = [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert events == ["started", "saved", "stopped", "resumed", "saved", "finished"]


def test_a_complete_run_started_again_does_nothing(finished, command):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    codes, output = run(command(finished), finished.parent / "again.log")
    assert codes == [0, 0], output
    assert "complete at step 12; nothing to do" in output
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_old_checkpoints_are_removed_but_for_the_kept_ones(tmp_path, command):
    options = ["checkpoint.save_every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=5"]
    codes, output = run(command(tmp_path / "run", *options), tmp_path / "log", world_size=1)
    assert codes == [0], output
    assert published(tmp_path / "run") == [5, 10, 11, 12]


def refused(words, log, *expected, world_size=2):
    codes, output = run(words, log, world_size)
    assert codes == [2] * world_size, output
    message = output[output.index("error:") :]
    for part in expected:
        assert part in message, output
    assert "Traceback" not in output


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_what_stops_the_main_process_alone_stops_all_with_its_message(tmp_path, command):
    """The others do not wait in a collective for a process that has ended."""
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    refused(command(tmp_path / "run"), tmp_path / "log", "metrics.jsonl", "directory")


def test_lost_and_damaged_rows_of_the_metrics_are_told_and_the_run_goes_on(copied, command, tmp_path):
    """As a power cut or a bad disk leaves them; with 1 process, which is enough to read a checkpoint of 2."""
    shutil.rmtree(step_dir(copied, 12))
    path = copied / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    found = b"".join([*before[:2], b"\xff" + before[2], *before[4:]])
    path.write_bytes(found)
    codes, output = run([*command(copied), "train.max_steps=7", "log.progress=true"], tmp_path / "log", world_size=1)
    assert codes == [0], output
    assert f"warning: {path}: 1 damaged lines were left out; the file as it was is metrics.jsonl.damaged" in output
    assert f"warning: {path}: 6 rows up to step 6, and the checkpoint counts 8: 2 are lost" in output
    assert (copied / "metrics.jsonl.damaged").read_bytes() == found
    assert [row["step"] for row in rows(copied)] == [0, 1, 4, 4, 5, 6, 7, 7]
    events = [json.loads(line) for line in (copied / "events.jsonl").read_text().splitlines()]
    told = {event["event"]: event for event in events if event["event"].startswith("rows_")}
    assert (told["rows_damaged"]["lines"], told["rows_damaged"]["kept_as"]) == (1, "metrics.jsonl.damaged")
    assert (told["rows_missing"]["expected"], told["rows_missing"]["found"]) == (8, 6)


@pytest.mark.parametrize("kind", ["false", pytest.param("true", marks=pytest.mark.exhaustive)])
def test_rows_up_to_a_checkpoint_are_flushed_before_it_can_be_seen(kind, tmp_path, command):
    words = command(tmp_path / "run", "checkpoint.save_every=2", f"checkpoint.asynchronous={kind}", "train.max_steps=6")
    start(train_and_note_flushes, 1, words, tmp_path, log=tmp_path / "log").finish(120)
    noted = [json.loads(line) for line in (tmp_path / "noted").read_text().splitlines()]
    assert [place for kind, place, _ in noted if kind == "rename"] == [f"step_{step:08d}" for step in (2, 4, 6)]
    for index, (kind, place, _) in enumerate(noted):
        if kind == "rename":
            flushed = {name: held for kind, name, held in noted[:index] if kind == "fsync"}
            assert flushed["metrics.jsonl"] >= int(place[-2:])
            assert flushed["events.jsonl"] >= 1


def train_and_note_flushes(words, where):
    """Note each flush of rows, with how many there are, and each publication of a checkpoint."""
    noted = []

    def handle(name, call, args, kwargs):
        place = place_of(args, kwargs)
        result = call()
        if name == "fsync" and place.suffix == ".jsonl":
            noted.append((name, place.name, len(place.read_bytes().splitlines())))
        if name in ("rename", "replace") and place.name.startswith("step_"):
            noted.append(("rename", Path(args[1]).name, 0))
        return result

    with standing_in(handle):
        code = train_command(words)
    (where / "noted").write_text("".join(json.dumps(one) + "\n" for one in noted))
    return code


def test_resume_never_refuses_a_folder_with_checkpoints(copied, command, tmp_path):
    refused(command(copied, "checkpoint.resume=never"), tmp_path / "log", "'never'", "holds step 12")


def test_resume_must_refuses_to_start_from_step_0(tmp_path, command):
    refused(command(tmp_path / "new", "checkpoint.resume=must"), tmp_path / "log", "'must'", "no complete checkpoint")


def test_a_checkpoint_of_another_model_seed_or_batch_is_refused_by_name(copied, command, tmp_path):
    words = command(copied, "train.max_steps=20", "model.n_layer=3", "run.seed=5", "train.global_batch_size=16")
    refused(
        words,
        tmp_path / "log",
        "model.n_layer is 2 in the checkpoint, 3 in the configuration",
        "run.seed is 1234 in the checkpoint, 5 in the configuration",
        "train.global_batch_size is 8 in the checkpoint, 16 in the configuration",
    )


def test_a_checkpoint_of_another_optimizer_is_refused(copied, command, tmp_path):
    words = command(copied, "train.max_steps=20", "optim.name=muon")
    refused(words, tmp_path / "log", "optim.name is 'adamw' in the checkpoint, 'muon' in the configuration")
    words = command(tmp_path / "muon", "optim.name=muon", "train.max_steps=3")
    codes, output = run(words, tmp_path / "muon.log", world_size=1)
    assert codes == [0], output
    words = command(tmp_path / "muon", "train.max_steps=6")
    expected = "optim.name is 'muon' in the checkpoint, 'adamw' in the configuration"
    refused(words, tmp_path / "adamw.log", expected, world_size=1)


def test_a_checkpoint_of_other_data_is_refused(copied, command, tmp_path):
    with TokenFileWriter(tmp_path / "other", "<u2") as writer:
        writer.add_document(list(range(60)) * 20)
    words = command(copied, "train.max_steps=20", f"data.train={tmp_path / 'other'}")
    refused(words, tmp_path / "log", "data.train holds other tokens")


def test_a_damaged_checkpoint_is_refused_on_all_ranks_naming_the_file(copied, command, tmp_path):
    damaged = step_dir(copied, 12) / "rank_00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    refused(command(copied, "train.max_steps=20"), tmp_path / "log", str(damaged), "damaged")


def test_a_diverging_run_ends_with_exit_code_3_and_its_last_checkpoint_stands(tmp_path, command):
    run_dir = tmp_path / "run"
    words = command(run_dir, "checkpoint.save_every=2", "optim.lr=1e30", "optim.warmup_steps=0", "eval.every=0")
    codes, output = run(words, tmp_path / "log")
    assert codes == [3, 3], output
    assert "error: " in output
    assert "is nan" in output or "is inf" in output
    for step in published(run_dir):
        verify_checkpoint(step_dir(run_dir, step))
    assert all(row["loss"] == row["loss"] for row in rows(run_dir))
