"""What cannot be removed, what stands in the way, what fills the disk: told, and no save fails because of it."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import contextmanager

import pytest

from megagpt.checkpoint.store import CheckpointStore, verify_checkpoint
from megagpt.errors import CheckpointError
from tests.checkpoint.calls import place_of, standing_in
from tests.checkpoint.faults import failing_at, over_quota
from tests.checkpoint.small_saves import State, Told, check_whole, save, saver

TENSORS = "rank_00000.safetensors"


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def asynchronous(request):
    return request.param


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


@contextmanager
def held_open(*paths):
    """As NFS has it while a reader holds a file of the folder open: the folder is never empty."""

    def handle(name, call, args, kwargs):
        if name == "rmdir" and place_of(args, kwargs) in paths:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(args[0]))
        return call()

    with standing_in(handle):
        yield


def save_at(by, state, *steps):
    for step in steps:
        state.set(step)
        by.save({"step": step})
        by.settle()


@pytest.mark.parametrize("name", ["step_00000005.removed", "step_00000030.tmp", "step_00000030.removed"])
def test_what_cannot_be_removed_is_told_and_stops_no_save(name, asynchronous, store):
    state, told = State(), Told()
    (store.folder / name).mkdir(parents=True)
    with saver(store, state, told, asynchronous=asynchronous, keep_last=1) as by:
        with held_open(store.folder / name):
            save_at(by, state, 30, 40)
        assert told.saved == [30, 40]
        assert check_whole(store) == [40]
        assert [(event["event"], event["step"]) for event in told.events] == [("not_removed", 30), ("not_removed", 40)]
        assert all(f"{store.folder / name}: Directory not empty" in event["cause"] for event in told.events)
        assert "tried again after the next save" in told.lines[0]
        assert names(store) == sorted([name, "step_00000040"])
        told.events.clear()
        save_at(by, state, 50)
    assert told.events == []
    assert names(store) == ["step_00000050"], "gone as soon as it could be"


def test_one_old_checkpoint_that_cannot_be_removed_keeps_no_other_one(store):
    for step in (1, 2, 3, 4):
        save(store, step, keep_last=9)
    with held_open(store.step_dir(1).with_suffix(".removed")):
        removed = store.prune(1, 0)
    assert removed.steps == [1, 2, 3]
    assert len(removed.failures) == 1
    assert names(store) == ["step_00000001.removed", "step_00000004"]


def test_what_is_no_checkpoint_and_has_the_name_of_a_step_is_set_aside_and_the_step_saved(asynchronous, store):
    """Else a run whose last step is taken ends with a failed save every time that it is started."""
    save(store, 5)
    (store.folder / "step_00000010").mkdir()
    (store.folder / "step_00000010" / TENSORS).write_bytes(b"half")
    (store.folder / "step_00000010.damaged").mkdir()
    state, told = State(10), Told()
    with saver(store, state, told, asynchronous=asynchronous) as by:
        by.save({"step": 10}, last=True)
    assert check_whole(store) == [5, 10]
    assert (store.folder / "step_00000010.1.damaged" / TENSORS).read_bytes() == b"half", "nothing of it is lost"
    (event,) = told.events
    assert (event["event"], event["step"]) == ("set_aside", 10)
    assert "has no manifest.json" in event["cause"]
    assert "step_00000010.1.damaged" in told.lines[0]


def test_a_step_that_is_saved_otherwise_is_never_overwritten_and_the_message_says_what_to_do(store):
    save(store, 10)
    manifest = store.step_dir(10) / "manifest.json"
    content = manifest.read_bytes().replace(b'"torch": "2"', b'"torch": "3"')
    manifest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000010: exists already, .*Move it to another folder"):
        save(store, 10)
    assert manifest.read_bytes() == content


def test_names_of_what_was_set_aside_never_meet(store):
    for number in range(3):
        save(store, 3)
        aside = store.set_aside(3)
        assert aside.is_dir()
        if number == 0:
            first = aside
        elif number == 1:
            shutil.rmtree(first)
    assert len(store.leftovers(".damaged")) == 2


@contextmanager
def spoiled_at(store, step):
    """What was written in good order lies on the disk otherwise."""

    def handle(name, call, args, kwargs):
        result = call()
        if name in ("rename", "replace") and str(args[1]) == str(store.step_dir(step)):
            path = store.step_dir(step) / TENSORS
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return result

    with standing_in(handle):
        yield


def test_no_older_checkpoint_goes_before_the_new_one_was_read_back_from_the_disk(asynchronous, store):
    state, told = State(), Told()
    with saver(store, state, told, asynchronous=asynchronous, keep_last=1) as by:
        save_at(by, state, 10)
        with spoiled_at(store, 20):
            save_at(by, state, 20)
        assert store.steps() == [10, 20]
        (event,) = told.events
        assert (event["event"], event["step"]) == ("not_removed", 20)
        assert f"rank 0: {store.step_dir(20) / TENSORS}: damaged" in event["cause"]
        assert "old checkpoints not removed, because the new one cannot be relied on" in told.lines[0]
        verify_checkpoint(store.step_dir(10))
        save_at(by, state, 30)
    assert check_whole(store) == [30]
    assert len(told.events) == 1


def test_reading_back_can_be_switched_off(store):
    state, told = State(), Told()
    with saver(store, state, told, keep_last=1, verify_before_prune=False) as by, spoiled_at(store, 20):
        save_at(by, state, 10, 20)
    assert store.steps() == [20]
    assert told.events == []


@contextmanager
def room_for(n_checkpoints, store, monkeypatch):
    """A disk that holds so many checkpoints and a half: `free_bytes` says what is left."""
    size = len(b"".join(map(bytes, content_of(store))))

    def free(folder):
        used = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        return int((n_checkpoints + 0.5) * size) - used

    with monkeypatch.context() as patches:
        patches.setattr("megagpt.checkpoint.fsio.free_bytes", free)
        yield


def content_of(store):
    from megagpt.checkpoint.tensors import RankFile

    return RankFile.of(State()()).chunks()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "removed", "left"),
    [(3, 0, [[10], [20]], [30, 40, 50]), (2, 20, [[30]], [20, 40, 50])],
)
def test_a_disk_with_room_for_what_is_kept_and_no_more_lets_the_oldest_make_room(
    keep_last, keep_every, removed, left, asynchronous, store, monkeypatch
):
    """The oldest that the rule would remove anyway, once the new one is there."""
    state, told = State(), Told()
    with (
        saver(store, state, told, asynchronous=asynchronous, keep_last=keep_last, keep_every=keep_every) as by,
        room_for(3, store, monkeypatch),
    ):
        save_at(by, state, 10, 20, 30, 40, 50)
    assert told.saved == [10, 20, 30, 40, 50]
    assert check_whole(store) == left
    assert [(event["event"], event["removed"]) for event in told.events] == [("made_room", one) for one in removed]
    assert f"the checkpoint of step {removed[0][0]} made way for it" in told.lines[0]


def test_a_full_quota_is_seen_only_by_writing_and_then_the_oldest_makes_room_too(asynchronous, store):
    for step in (10, 20):
        save(store, step)
    state, told = State(30), Told()
    with saver(store, state, told, asynchronous=asynchronous, keep_last=2) as by, failing_at(5, over_quota, once=True):
        save_at(by, state, 30)
    assert check_whole(store) == [20, 30]
    assert [event["event"] for event in told.events] == ["made_room"]


@pytest.mark.parametrize("why", ["it is the only one", "the newest is damaged", "switched off", "another failure"])
def test_no_checkpoint_makes_room_where_that_would_lose_something(why, store, monkeypatch):
    older = (20,) if why == "it is the only one" else (10, 20)
    for step in older:
        save(store, step, keep_last=9)
    if why == "the newest is damaged":
        (store.step_dir(20) / TENSORS).write_bytes(b"")
    state, told = State(30), Told()
    settings = {"keep_last": len(older), "make_room": why != "switched off"}
    with saver(store, state, told, asynchronous=False, **settings) as by:
        if why == "another failure":
            with failing_at(5, lambda: OSError(errno.EIO, os.strerror(errno.EIO)), once=True):
                save_at(by, state, 30)
        else:
            with room_for(len(older) - 0.6, store, monkeypatch):
                save_at(by, state, 30)
        (event,) = told.events
        assert event["event"] == "save_failed"
        expected = "Input/output error" if why == "another failure" else "and the disk has"
        assert expected in event["cause"]
        assert ("no room was made" in event["cause"]) == (why == "the newest is damaged")
        assert store.steps() == list(older)
