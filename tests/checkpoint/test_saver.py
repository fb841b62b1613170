"""A run goes on while its checkpoint is written, and goes on when it cannot be: told, undone, tried again."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest
import torch

from megagpt.checkpoint.host_copy import HostCopy
from megagpt.checkpoint.store import CheckpointStore
from megagpt.checkpoint.tensors import KINDS, RankFile, TensorSlice
from megagpt.errors import CheckpointError
from tests.checkpoint.calls import standing_in
from tests.checkpoint.faults import failing_at, io_error, no_space
from tests.checkpoint.small_saves import State, Told, check_whole, save, saver


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


@contextmanager
def slow_disk():
    """No write gets through until the event is set."""
    gate = threading.Event()

    def handle(name, call, args, kwargs):
        if name == "write":
            assert gate.wait(60)
        return call()

    with standing_in(handle):
        try:
            yield gate
        finally:
            gate.set()


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_training_goes_on_while_a_checkpoint_is_written_and_cannot_change_it(store):
    state, told = State(10), Told()
    with slow_disk() as gate, saver(store, state, told) as by:
        by.save({"step": 10})  # returns, and not one byte is on disk
        assert by.under_way == 10
        state.set(11)
        assert store.steps() == []
        assert not any(by.is_due(step) for step in range(11, 20))
        gate.set()
    assert check_whole(store) == [10]
    assert told.lines == told.events == []


def test_nothing_is_visible_before_the_last_file_is_durable_and_the_old_goes_after_the_new(store):
    seen = []

    def handle(name, call, args, kwargs):
        seen.append(store.steps())
        return call()

    state, told = State(), Told()
    with saver(store, state, told, keep_last=1) as by:
        for step in (10, 20):
            state.set(step)
            if step == 20:
                by.is_due(20)
            with standing_in(handle):
                by.save({"step": step})
                by.__exit__(ValueError, None, None) if step == 20 else by.settle()
    assert [steps for i, steps in enumerate(seen) if i == 0 or steps != seen[i - 1]] == [[], [10], [10, 20], [20]]


def test_a_second_save_waits_for_the_first_and_says_so(store):
    state, told = State(10), Told()
    with slow_disk() as gate, saver(store, state, told) as by:
        by.save({"step": 10})
        threading.Timer(0.3, gate.set).start()
        started_at = time.monotonic()
        state.set(20)
        by.save({"step": 20})
        assert time.monotonic() - started_at > 0.2
        assert by.blocked_seconds > 0.2
    assert check_whole(store) == [10, 20]
    assert len(told.lines) == 1
    assert "waiting for the save of step 10" in told.lines[0]
    assert "save_every" in told.lines[0]


def test_the_last_save_waits_for_the_one_under_way_and_is_durable_when_it_returns(store):
    """As when a run is asked to stop in the middle of a save."""
    state, told = State(10), Told()
    with slow_disk() as gate, saver(store, state, told) as by:
        by.save({"step": 10})
        threading.Timer(0.2, gate.set).start()
        state.set(11)
        by.save({"step": 11}, last=True)
        assert by.under_way is None
        assert check_whole(store) == [10, 11]


@pytest.mark.parametrize("kind", [ValueError, None])
def test_the_end_of_a_run_waits_for_the_save_under_way(kind, store):
    state, told = State(10), Told()
    with slow_disk() as gate:
        by = saver(store, state, told)
        by.save({"step": 10})
        threading.Timer(0.2, gate.set).start()
        by.__exit__(kind, None, None)
        assert check_whole(store) == [10]


def test_an_interrupted_run_does_not_wait(store):
    state, told = State(10), Told()
    with slow_disk():
        by = saver(store, state, told)
        by.save({"step": 10})
        with pytest.raises(KeyboardInterrupt), by:
            raise KeyboardInterrupt
        assert store.steps() == []


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_failed_save_is_told_counted_undone_and_tried_again_before_the_next_is_due(asynchronous, store):
    save(store, 5)
    state, told = State(10), Told()
    with saver(store, state, told, asynchronous=asynchronous) as by:
        with failing_at(6, no_space, once=True):
            by.save({"step": 10})
            due = next(step for step in range(11, 40) if by.is_due(step) or time.sleep(0.1))
        assert due == (13 if not asynchronous else due)
        assert due % 3 == 1
        assert by.failed_in_a_row == 1
        assert names(store) == ["step_00000005"], "its room is free again"
        (event,) = told.events
        assert (event["event"], event["step"], event["in_a_row"]) == ("save_failed", 10, 1)
        assert "No space left on device" in event["cause"]
        assert "step_00000010.tmp" in event["cause"]
        assert told.lines[0].startswith("warning: ")
        assert "tried again in 3 steps" in told.lines[0]
        state.set(due)
        by.save({"step": due})
    assert check_whole(store) == [5, due]
    assert by.failed_in_a_row == 0
    assert not by.is_due(due + 3)


def test_a_failed_save_waits_for_the_next_due_one_where_that_is_asked_for(store):
    state, told = State(10), Told()
    with saver(store, state, told, asynchronous=False, retry_after=0) as by:
        with failing_at(6, io_error):
            by.save({"step": 10})
        assert [step for step in range(11, 31) if by.is_due(step)] == [20, 30]
        assert "tried again when the next save is due" in told.lines[0]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("call", ["write", "rename", "replace", "mkdir", "rmdir"])
def test_whatever_a_call_raises_is_a_failure_that_is_told(call, asynchronous, store):
    """No error of the operating system, and in what the main rank does alone: the others would wait for it."""
    save(store, 5)
    state, told = State(10), Told()
    raised = []

    def handle(name, made, args, kwargs):
        if name == call and not raised:
            raised.append(name)
            raise ValueError("a fault of the program")
        return made()

    with saver(store, state, told, asynchronous=asynchronous, keep_last=1) as by:
        with standing_in(handle):
            by.save({"step": 10})
            by.settle()
        if raised:
            (event,) = told.events
            assert event["event"] == ("not_removed" if call == "rmdir" else "save_failed")
            assert "ValueError('a fault of the program')" in event["cause"]
        state.set(20)
        by.save({"step": 20})
    assert check_whole(store)[-1] == 20
    assert raised or call in ("rename", "replace"), "one of the two publishes"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_so_many_failed_saves_in_a_row_end_the_run_where_that_is_asked_for(asynchronous, store):
    state, told = State(10), Told()
    save(store, 5)

    def run():
        with saver(store, state, told, asynchronous=asynchronous, max_failed_saves=2) as by, failing_at(1, no_space):
            for step in (10, 20, 30):
                by.save({"step": step})

    with pytest.raises(
        CheckpointError, match=r"2 saves in a row have failed \(checkpoint.max_failed_saves\).*No space"
    ):
        run()
    assert [event["in_a_row"] for event in told.events] == [1, 2]
    assert check_whole(store) == [5]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_the_last_save_is_tried_again_at_once(asynchronous, store):
    state, told = State(10), Told()
    with saver(store, state, told, asynchronous=asynchronous) as by, failing_at(6, io_error, once=True):
        by.save({"step": 10}, last=True)
        assert check_whole(store) == [10]
    assert [event["event"] for event in told.events] == ["save_failed"]


def test_a_disk_that_fails_after_the_rename_leaves_a_checkpoint_that_the_next_attempt_makes_durable(store):
    state, told = State(10), Told()
    with failing_at(10**9, io_error) as system, saver(store, state, told, asynchronous=False) as by:
        by.save({"step": 10})
    count = system.calls
    for k in range(count - 1, count + 1):  # the rename, the flush behind it
        again = CheckpointStore(store.folder.parent / f"{k}" / "checkpoints")
        with failing_at(k, io_error, once=True), saver(again, state, told, asynchronous=False) as by:
            by.save({"step": 10}, last=True)
        assert check_whole(again) == [10]
        assert names(again) == ["step_00000010"]


@pytest.mark.parametrize("before", [[], [5]])
def test_a_last_save_that_fails_is_an_error_that_names_what_stands(before, store, monkeypatch):
    monkeypatch.setattr("megagpt.checkpoint.saver.SECONDS_BETWEEN", 0.01)
    for step in before:
        save(store, step)
    stands = "the checkpoint of step 5 stands" if before else "there is no checkpoint of this run"
    state, told = State(10), Told()
    with (
        pytest.raises(CheckpointError, match=f"the last save, of step 10, failed 3 times: .*No space.*{stands}"),
        saver(store, state, told) as by,
        failing_at(1, no_space),
    ):
        by.save({"step": 10}, last=True)
    assert check_whole(store) == before
    assert len(told.events) == 3


def test_old_checkpoints_that_cannot_be_removed_are_told_and_the_save_counts(store):
    state, told = State(10), Told()
    with saver(store, state, told, asynchronous=False, keep_last=1) as by:
        by.save({"step": 10})
        state.set(20)

        def handle(name, call, args, kwargs):
            if name == "rmdir":
                raise io_error()
            return call()

        with standing_in(handle):
            by.save({"step": 20})
        assert by.failed_in_a_row == 0
        (event,) = told.events
        assert event["event"] == "not_removed"
        assert "Input/output error" in event["cause"]
        state.set(30)
        by.save({"step": 30})
    assert check_whole(store) == [30]
    assert names(store) == ["step_00000030"]


def test_room_is_looked_for_before_a_byte_is_written(store):
    save(store, 1)
    with pytest.raises(
        CheckpointError, match=r"needs 1,000,000,000,000,000,000 bytes \(1e\+09 GB\) and the disk has [\d,]+ free"
    ):
        store.begin(2, needed=10**18)
    assert names(store) == ["step_00000001"]


def parts(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [
        TensorSlice(f"t{i}", (size,), 0, {kind: torch.randn(size, generator=generator) for kind in KINDS})
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("reserved", [False, True])
def test_a_copy_is_the_file_that_the_values_themselves_make(reserved, monkeypatch):
    monkeypatch.setattr("megagpt.checkpoint.host_copy.SEGMENT_NUMEL", 7)
    copy, held = HostCopy(torch.device("cpu")), parts(5, 0, 7, 20, 1)
    expected = b"".join(bytes(chunk) for chunk in RankFile.of(held).chunks())
    if reserved:
        copy.reserve(held)
        assert copy.n_bytes == 4 * 3 * 33
    for _ in range(2):
        file = copy.take(iter(held))
        assert b"".join(bytes(chunk) for chunk in file.chunks()) == expected
        assert file.n_bytes == len(expected)
    assert copy.n_bytes == 4 * 3 * 33, "the memory is used again"


def test_values_of_other_types_are_copied_as_fp32():
    values = torch.arange(4, dtype=torch.bfloat16)
    slices = [TensorSlice("w", (4,), 0, dict.fromkeys(KINDS, values))]
    copied = HostCopy(torch.device("cpu")).take(slices)
    assert b"".join(map(bytes, copied.chunks())) == b"".join(map(bytes, RankFile.of(slices).chunks()))
