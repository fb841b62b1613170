"""A rank that hangs, stops or dies: found in time, named, its stacks written, and no process left behind."""

from __future__ import annotations

import json
import os
import subprocess
import time

import psutil
import pytest

from megagpt.checkpoint.store import verify_checkpoint
from megagpt.errors import TrainingHung
from tests.distributed.faults import Fault, train_with_fault
from tests.distributed.processes import start
from tests.distributed.test_launcher import LAUNCHER, ROOT, kill
from tests.distributed.test_resume import published, rows, step_dir, wait_until
from tests.tiny import run_words

HUNG = TrainingHung.exit_code
DEADLINE = 3.0
LEEWAY = 5.0
"""Seconds after the deadline in which everything must be over."""


@pytest.fixture
def words(tmp_path, tokens, val_tokens):
    """A run that evaluates at steps 0, 4, 8 ... and saves at steps 3, 6 ..."""

    def make(*overrides):
        usual = [
            f"data.val={val_tokens}",
            "eval.every=4",
            "eval.sequences=8",
            "checkpoint.save_every=3",
            "train.max_steps=2000",
            *(f"watch.{phase}_seconds={DEADLINE}" for phase in ("step", "eval", "save")),
            "watch.startup_seconds=200",
        ]
        return run_words(tmp_path / "run", tokens, *usual, *overrides)

    return make


def run_until_found(command, world_size, log, *faults):
    """(exit codes, output, seconds from the last step that was recorded to the end of the last process)."""
    group = start(train_with_fault, world_size, command, *faults, log=log)
    codes = group.wait(260)
    run_dir = log.parent / "run"
    return codes, group.output(), time.time() - (run_dir / "metrics.jsonl").stat().st_mtime, run_dir


def hung_event(run_dir):
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "hung"]
    return event


def stacks(run_dir):
    return {int(path.stem.removeprefix("rank_")): path.read_text() for path in (run_dir / "stacks").iterdir()}


HANGS = [
    # kind, world size, rank, at, layout, what the verdict says
    ("sleeps in loader", 2, 1, 6, ["parallel.zero_stage=2"], "reading data", "step 6"),
    ("sleeps in step", 3, 2, 6, ["train.global_batch_size=6"], "computing", "step 6"),
    ("sleeps in eval", 2, 0, 2, [], "eval at step 4", "eval at step 4"),
    ("sleeps in save", 2, 1, 1, ["checkpoint.asynchronous=false"], "writing", "save at step 3"),
    # The first call sizes the buffers, at the start. The others do not wait for the copy, but in the next step.
    ("sleeps in save", 2, 1, 2, [], "writing", "step 4"),
    ("sleeps in step", 4, 3, 6, ["parallel.pipeline=2", "parallel.tensor=2"], "computing", "step 6"),
    ("sleeps in step", 2, 0, 6, ["parallel.zero_stage=3"], "computing", "step 6"),
]


@pytest.mark.parametrize(
    ("kind", "world_size", "rank", "at", "layout", "doing", "where"),
    [
        HANGS[0],
        *(pytest.param(*hang, marks=pytest.mark.exhaustive) for hang in HANGS[1:]),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_a_rank_that_hangs_is_named_and_all_end(kind, world_size, rank, at, layout, doing, where, words, tmp_path):
    found = run_until_found(words(*layout), world_size, tmp_path / "log", Fault(kind, rank, at))
    codes, output, seconds, run_dir = found
    assert codes == [HUNG] * world_size, output
    assert seconds < DEADLINE + LEEWAY, output
    assert f"error: {where} is not done after" in output
    assert f"rank {rank} (" in output
    assert "did not arrive" in output
    assert doing in output
    event = hung_event(run_dir)
    assert event["ranks"] == [rank]
    found = stacks(run_dir)
    assert sorted(found) == list(range(world_size))
    assert "faults.py" in found[rank]
    assert all("Current thread" in text or "Thread 0x" in text for text in found.values())
    for step in published(run_dir):
        verify_checkpoint(step_dir(run_dir, step))


@pytest.mark.parametrize(
    ("kind", "rank", "mode"),
    [
        ("sleeps in writer", 1, "true"),
        *(
            pytest.param(*row, marks=pytest.mark.exhaustive)
            for row in [("sleeps in writer", 0, "true"), ("sleeps in publish", 0, "true"),
                        ("sleeps in writer", 1, "false"), ("sleeps in publish", 0, "false")]
        ),
    ],
)  # fmt: skip
def test_a_rank_whose_save_hangs_is_named_while_training_goes_on(kind, rank, mode, words, tmp_path):
    """Steps of 0.05 s, saves after 100 of them, 3 s for a save: the next one would wait for it too late."""
    command = words("checkpoint.save_every=100", "eval.every=0", f"checkpoint.asynchronous={mode}")
    slow = Fault("slow steps", -1, 95)
    codes, output, _, run_dir = run_until_found(command, 2, tmp_path / "log", slow, Fault(kind, rank, 1))
    assert codes == [HUNG, HUNG], output
    event = hung_event(run_dir)
    assert event["ranks"] == [rank]
    assert event["reason"].startswith("save at step 100 is not ")
    assert "watch.save_seconds" in event["reason"]
    assert f"rank {rank} (" in event["verdict"]
    assert "did not arrive: " + ("writing, at " if mode == "true" else "save at step 100 (writing), at ") in output
    assert "checkpoint/save.py" in event["verdict"]
    assert event["step"] in (range(101, 200) if mode == "true" else [100]), output
    assert published(run_dir) == []
    found = stacks(run_dir)
    assert sorted(found) == [0, 1]
    assert "faults.py" in found[rank]


@pytest.mark.exhaustive
def test_a_save_that_cannot_be_agreed_on_ends_all_ranks(words, tmp_path):
    """The collectives of the thread fail on one rank: the others would wait for it for half an hour."""
    command = words("watch.save_seconds=200", "watch.step_seconds=200", "checkpoint.retry_after=0")
    fault = Fault("loses the group of saves", 1, 1)
    codes, output, seconds, run_dir = run_until_found(command, 2, tmp_path / "log", fault)
    assert codes == [HUNG, HUNG], output
    assert seconds < 20, output
    event = hung_event(run_dir)
    assert event["reason"].startswith("save at step 3: the ranks cannot agree on it any more")
    assert event["ranks"] == [1]
    assert "Socket closed (put here by a test)" in output
    assert published(run_dir) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_gives_no_sign_of_life_is_named_long_before_a_deadline(rank, words, tmp_path):
    fault = Fault("gives no sign of life", rank, 20)
    command = words("watch.silent_seconds=4", "watch.step_seconds=100", "checkpoint.save_every=0", "eval.every=0")
    slow = Fault("slow steps", -1, 20)
    codes, output, _, run_dir = run_until_found(command, 2, tmp_path / "log", slow, fault)
    assert codes == [HUNG, HUNG], output
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    event, *_ = [event for event in events if event["event"] == "hung"]  # that rank hears nothing, and tells for itself
    assert f"rank {rank} has given no sign of life for " in event["reason"]
    assert "(limit 4 s, watch.silent_seconds)" in event["reason"]
    assert event["ranks"] == [rank]
    assert 25 < event["step"] < 1000, "not at once, and not at the end"


@pytest.mark.exhaustive
def test_signs_of_life_are_not_waited_for_where_that_is_asked_for(words, tmp_path):
    fault = Fault("gives no sign of life", 1, 20)
    command = words("watch.silent_seconds=0", "checkpoint.save_every=0", "train.max_steps=150", "eval.every=0")
    start(train_with_fault, 2, command, Fault("slow steps", -1, 20), fault, log=tmp_path / "log").finish()


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_without_a_deadline(rank, words, tmp_path):
    """Nor does a collective that waits for it end the run. Rank 0 takes the store with it, through which ranks hear."""
    command = words("watch.silent_seconds=5", "watch.step_seconds=100", "checkpoint.save_every=0")
    codes, output, seconds, run_dir = run_until_found(command, 2, tmp_path / "log", Fault("stopped", rank, 6))
    assert codes == [-9 if each == rank else HUNG for each in range(2)], output
    assert seconds < 30, output
    event = hung_event(run_dir)
    assert event["ranks"] == [rank]
    silent = ["the store of the process group, in rank 0 or its launcher, has not answered for ",
              "rank 1 has given no sign of life for "]  # fmt: skip
    assert event["reason"].startswith(silent[rank])


@pytest.mark.parametrize(
    ("world_size", "rank"),
    [(2, 1), pytest.param(3, 0, marks=pytest.mark.exhaustive), pytest.param(4, 2, marks=pytest.mark.exhaustive)],
)
def test_a_stopped_rank_is_named_and_killed_by_its_neighbours(world_size, rank, words, tmp_path):
    """Rank 0 holds the store: with it stopped, nobody can ask anybody."""
    command = words("train.global_batch_size=12", "train.micro_batch_size=1")
    codes, output, seconds, run_dir = run_until_found(command, world_size, tmp_path / "log", Fault("stopped", rank, 6))
    assert codes == [-9 if each == rank else HUNG for each in range(world_size)], output
    assert seconds < DEADLINE + LEEWAY, output
    assert f"rank {rank} (" in output
    assert "is stopped by a signal" in output
    assert hung_event(run_dir)["ranks"] == [rank]
    assert sorted(stacks(run_dir)) == [each for each in range(world_size) if each != rank]


@pytest.mark.parametrize(
    ("world_size", "rank"),
    [(2, 1), pytest.param(4, 0, marks=pytest.mark.exhaustive), pytest.param(3, 2, marks=pytest.mark.exhaustive)],
)
def test_a_killed_rank_ends_all_within_five_seconds(world_size, rank, words, tmp_path):
    command = words("train.global_batch_size=12", "train.micro_batch_size=1", "watch.step_seconds=100")
    codes, output, seconds, run_dir = run_until_found(command, world_size, tmp_path / "log", Fault("killed", rank, 6))
    assert codes == [-9 if each == rank else HUNG for each in range(world_size)], output
    assert seconds < 5, output
    assert f"rank {rank} (" in output
    assert "has died" in output
    assert hung_event(run_dir)["ranks"] == [rank]
    assert "Traceback" not in output


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["true", "false"])
@pytest.mark.parametrize(
    ("kind", "rank", "at"),
    [("killed in eval", 1, 2), ("stopped in eval", 0, 2), ("killed in writer", 1, 1), ("killed in writer", 0, 1),
     ("stopped in writer", 1, 1), ("stopped in writer", 0, 1)],
)  # fmt: skip
def test_a_rank_that_is_stopped_or_killed_in_an_evaluation_or_a_save(kind, rank, at, mode, words, tmp_path):
    """Evaluations at steps 0 and 4, the first save at step 3."""
    if "eval" in kind and mode == "false":
        pytest.skip("no save is under way there")
    fault = Fault(kind, rank, at)
    found = run_until_found(words(f"checkpoint.asynchronous={mode}"), 2, tmp_path / "log", fault)
    codes, output, seconds, run_dir = found
    assert codes == [-9 if each == rank else HUNG for each in range(2)], output
    assert seconds < DEADLINE + LEEWAY, output
    assert hung_event(run_dir)["ranks"] == [rank]
    assert ("has died" if "killed" in kind else "is stopped by a signal") in output
    for step in published(run_dir):
        verify_checkpoint(step_dir(run_dir, step))
    assert not any(step >= 3 for step in published(run_dir)) or "eval" in kind


@pytest.mark.exhaustive
def test_an_error_of_one_rank_alone_ends_the_others_with_its_words(words, tmp_path):
    codes, output, seconds, _ = run_until_found(words(), 2, tmp_path / "log", Fault("raises", 1, 6))
    assert codes == [HUNG, 1], output
    assert seconds < 8
    assert "ZeroDivisionError: division by zero" in output
    assert "rank 1 (" in output
    assert "ended: ZeroDivisionError" in output


@pytest.mark.exhaustive
def test_a_rank_that_holds_the_interpreter_is_ended_by_a_timer_that_needs_none(words, tmp_path):
    fault = Fault("holds the interpreter", 1, 250)  # the timer of the first step, which is a long one, is over
    codes, output, seconds, run_dir = run_until_found(words(), 2, tmp_path / "log", fault)
    assert codes[0] == HUNG, output
    assert codes[1] == 1, output
    assert seconds < DEADLINE + 10
    assert "rank 1 (" in output
    assert "Timeout (" in output
    assert hung_event(run_dir)["ranks"] == [1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["stopped", "sleeps in loader", "killed"])
def test_under_the_launcher_no_process_is_left(kind, words, tmp_path):
    """What the launcher itself does with a stopped rank: wait for half a minute, one rank after the other."""
    script, log = tmp_path / "faulty.py", tmp_path / "log"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from megagpt.train.environment import name_process, put_environment_first\n"
        "from megagpt.train.run import exit_process\n"
        "from tests.distributed.faults import Fault, train_with_fault\n"
        "if __name__ == '__main__':\n"
        "    put_environment_first(os.environ)\n"
        "    name_process(os.environ)\n"
        f"    exit_process(train_with_fault(sys.argv[1:], Fault({kind!r}, 1, 6)))\n"
    )
    port = str(20_000 + os.getpid() % 20_000)
    command = [str(LAUNCHER), "--num_accelerators", "2", "--master_port", port, str(script), *words()]
    with log.open("wb") as out:
        launcher = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )  # fmt: skip
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(rows(tmp_path / "run")) > 4, seconds=200)
        below = psutil.Process(launcher.pid).children(recursive=True)
        began = time.monotonic()
        assert launcher.wait(60) != 0, log.read_text()
        assert psutil.wait_procs(below, timeout=1)[1] == [], log.read_text()
        assert time.monotonic() - began < DEADLINE + LEEWAY + 3, log.read_text()  # the launcher looks once a second
    finally:
        kill(launcher)
    assert "rank 1 (" in log.read_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        ([], 2000),
        (["train.dtype=bf16"], 700),
        (["parallel.zero_stage=3"], 700),
    ],
    ids=["fp32", "bf16", "zero3"],
)
def test_thousands_of_clean_steps_raise_no_alarm(layout, steps, tokens, tmp_path):
    """Every watch as it is by default, but that replicas are compared five times as often."""
    command = run_words(
        tmp_path / "run", tokens, f"train.max_steps={steps}", "optim.lr=3e-3", "watch.replicas_every=20", *layout
    )
    group = start(train_with_fault, 2, command, log=tmp_path / "log")
    assert group.wait(280) == [0, 0], group.output()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"started", "saved", "finished"}, events
    assert not (tmp_path / "run" / "stacks").exists()


@pytest.mark.exhaustive
def test_a_rank_twenty_percent_slower_is_named_once_within_fifty_steps(tokens, tmp_path):
    command = run_words(tmp_path / "run", tokens, "train.max_steps=90", "log.progress=true")
    faults = [Fault("slow forward", -1, 1), Fault("slow forward", 1, 1)]
    group = start(train_with_fault, 2, command, *faults, log=tmp_path / "log")
    output = group.finish(120)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    (slow,) = [event for event in events if event["event"] == "slow_rank"]
    assert slow["rank"] == 1
    assert slow["step"] <= 50
    assert slow["part"] == "computing"
    assert 1.12 < slow["times"] < 1.4
    assert output.count("rank 1 is ") == 1


@pytest.mark.exhaustive
def test_a_deadline_of_zero_is_none(words, tmp_path):
    """Only to show that the fault alone ends nothing: the run would wait as long as the test lets it."""
    command = words("watch.step_seconds=0", "watch.startup_seconds=0")
    group = start(train_with_fault, 2, command, Fault("sleeps in loader", 1, 3), log=tmp_path / "log")
    assert group.wait(8) == [None, None], group.output()
    assert not (tmp_path / "run" / "stacks").exists()
