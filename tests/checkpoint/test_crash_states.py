"""A power cut at any moment of a save: every checkpoint that can be seen is whole, and what was saved is there."""

from __future__ import annotations

import os
import pickle
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint import fsio
from megagpt.checkpoint.choose import choose_step
from megagpt.checkpoint.manifest import MANIFEST, FileEntry, Manifest
from megagpt.checkpoint.store import CheckpointStore
from megagpt.checkpoint.tensors import write_slices
from megagpt.errors import CheckpointError
from megagpt.parallel.mesh import Mesh
from tests.checkpoint.crash_states import Call, History, recording, violations, without_flushing
from tests.checkpoint.faults import Killed, failing_at, killed, no_space
from tests.checkpoint.folders import folder_in_memory
from tests.checkpoint.small_saves import ALONE, State, Told, check_whole, identity, save, saver, slices
from tests.distributed.processes import start

N_RANDOM = 1000
SCALE = 70  # tensors of 840 and 2,520 bytes: writes of several sectors


def saves(run_dir: Path, *, asynchronous: bool, mesh: Mesh = ALONE, **settings: int) -> list[Call]:
    """The calls of three saves of a run, of which the third removes the first."""
    state, told = State(0, mesh, SCALE), Told()
    store = CheckpointStore(run_dir / "checkpoints")
    with recording(run_dir) as recorder, saver(store, state, told, asynchronous=asynchronous, **settings) as by:
        for step in (10, 20, 30):
            state.set(step)
            by.save({"step": step})
            by.settle()
            recorder.acknowledge(step)
    assert told.events == []
    return recorder.calls


def saves_with_a_full_disk(run_dir: Path) -> list[Call]:
    """The second of three saves fails half-way."""
    state, told = State(0, scale=SCALE), Told()
    store = CheckpointStore(run_dir / "checkpoints")
    with saver(store, state, told, asynchronous=False) as by:
        with recording(run_dir) as recorder:
            by.save({"step": 0})
            recorder.acknowledge(0)
        calls = recorder.calls
        with failing_at(6, no_space, once=True), recording(run_dir) as recorder:
            by.save({"step": 10})
        calls += recorder.calls
        with recording(run_dir) as recorder:
            state.set(20)
            by.save({"step": 20})
            recorder.acknowledge(20)
    assert [event["step"] for event in told.events] == [10]
    return calls + recorder.calls


def saves_that_make_room(run_dir: Path) -> list[Call]:
    """The third of three saves finds a full disk half-way, and the first checkpoint makes room for it."""
    state, told = State(0, scale=SCALE), Told()
    store = CheckpointStore(run_dir / "checkpoints")
    calls: list[Call] = []
    with saver(store, state, told, asynchronous=False, keep_last=2) as by:
        for step in (0, 10, 20):
            state.set(step)
            with failing_at(6 if step == 20 else 10**9, no_space, once=True), recording(run_dir) as recorder:
                by.save({"step": step})
                recorder.acknowledge(step)
            calls += recorder.calls
    assert [(event["event"], event["removed"]) for event in told.events] == [("made_room", [0])]
    return calls


def saves_after_a_kill(run_dir: Path) -> list[Call]:
    """A process is killed while it saves step 10; the next one saves it again."""
    store, state = CheckpointStore(run_dir / "checkpoints"), State(10, scale=SCALE)
    with recording(run_dir) as recorder:
        with saver(store, State(0, scale=SCALE), Told(), asynchronous=False) as by:
            by.save({"step": 0})
            recorder.acknowledge(0)
        with pytest.raises(Killed), failing_at(9, killed), saver(store, state, Told(), asynchronous=False) as by:
            by.save({"step": 10})
    calls = recorder.calls
    with recording(run_dir) as recorder, saver(store, state, Told(), asynchronous=False) as by:
        by.save({"step": 10})
        recorder.acknowledge(10)
    return calls + recorder.calls


def of_each_rank(run_dir: Path, kind: str, out: Path) -> None:
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = Mesh(rank, world_size, rank, torch.device("cpu"))
    calls = saves(run_dir, asynchronous=kind == "async", mesh=mesh)
    (out / f"{rank}.pickle").write_bytes(pickle.dumps(calls))
    torch.distributed.barrier()


def saves_of_several_ranks(run_dir: Path, kind: str) -> list[Call]:
    out = run_dir.parent / "out"
    out.mkdir()
    start(of_each_rank, 2, run_dir, kind, out, log=out / "log").finish(100)
    return [call for rank in range(2) for call in pickle.loads((out / f"{rank}.pickle").read_bytes())]


PROTOCOLS = {
    "sync": lambda run_dir: saves(run_dir, asynchronous=False),
    "async": lambda run_dir: saves(run_dir, asynchronous=True),
    "keeping one": lambda run_dir: saves(run_dir, asynchronous=False, keep_last=1),
    "a full disk": saves_with_a_full_disk,
    "making room": saves_that_make_room,
    "after a kill": saves_after_a_kill,
    "sync, 2 ranks": lambda run_dir: saves_of_several_ranks(run_dir, "sync"),
    "async, 2 ranks": lambda run_dir: saves_of_several_ranks(run_dir, "async"),
}


def what_is_wrong(run_dir: Path, acknowledged: int | None) -> str | None:
    """As a run starts again there, and saves."""
    store = CheckpointStore(run_dir / "checkpoints")
    try:
        steps = check_whole(store, SCALE)
        chosen = choose_step(store.folder, store.survey(), "auto")
    except (CheckpointError, AssertionError) as error:
        return f"what can be seen is not whole: {error}"
    if acknowledged is not None and (chosen is None or chosen < acknowledged):
        return f"step {acknowledged} was saved, and the run would go on from {chosen}"
    following = max([*steps, 0]) + 1
    save(store, following)
    assert following in store.steps()
    shutil.rmtree(run_dir)
    return None


@pytest.fixture
def folder(tmp_path):
    with folder_in_memory(tmp_path) as where:
        yield where


@pytest.fixture
def record(folder):
    def recorded(protocol):
        run_dir = folder / "run"
        run_dir.mkdir()
        return protocol(run_dir)

    return recorded


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "sync" else pytest.mark.exhaustive) for name in PROTOCOLS],
)
def test_no_crash_leaves_a_broken_checkpoint_or_loses_one(name, record, folder):
    history = History(record(PROTOCOLS[name]))
    count, found = violations(history, what_is_wrong, N_RANDOM, seed=1, where=folder / "states")
    assert found == []
    assert count >= N_RANDOM + 2 * 40


def in_place(run_dir: Path) -> list[Call]:
    """No staging folder: every file is flushed, the manifest comes last, and still it is seen before it is whole."""
    store = CheckpointStore(run_dir / "checkpoints")
    with recording(run_dir) as recorder:
        for step in (10, 20):
            folder = store.step_dir(step)
            fsio.make_dir(folder)
            entry = FileEntry(*write_slices(folder / "rank_00000.safetensors", slices(step, scale=SCALE)))
            who = identity()
            manifest = Manifest(step, {"rank_00000.safetensors": entry}, {"step": step}, who.config, "", None, {})
            fsio.write_file(folder / MANIFEST, [manifest.to_json()])
            fsio.flush_folder(folder)
            recorder.acknowledge(step)
    return recorder.calls


@pytest.mark.parametrize(
    ("unsafe", "expected"),
    [
        (lambda calls: without_flushing(calls, folders=False), "is not whole"),
        (lambda calls: without_flushing(calls, folders=True), "was saved, and the run would go on from"),
    ],
    ids=["files", "folders"],
)
def test_the_checker_sees_what_is_not_flushed(unsafe, expected, record, folder):
    calls = unsafe(record(PROTOCOLS["sync"]))
    _, found = violations(History(calls), what_is_wrong, 200, seed=1, where=folder / "states")
    assert any(expected in problem for problem in found)


def test_the_checker_sees_a_checkpoint_that_is_written_where_it_is_read(record, folder):
    _, found = violations(History(record(in_place)), what_is_wrong, 200, seed=1, where=folder / "states")
    assert any("is not whole" in problem for problem in found)
