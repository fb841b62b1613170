"""A disk that is really full, and then is not any more."""

from __future__ import annotations

import subprocess

import pytest

from megagpt.checkpoint.store import CheckpointStore
from tests.checkpoint.small_saves import State, Told, check_whole, saver

SIZE = 2**20
SCALE = 7_000
"""A checkpoint of 0.76 MB: one has room."""


@pytest.fixture
def disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(where)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"a file system of a given size cannot be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fills", ["before the save", "during the save"])
def test_a_full_disk_costs_one_save_and_nothing_else(fills, asynchronous, disk, monkeypatch):
    store, told, state = CheckpointStore(disk / "checkpoints"), Told(), State(10, scale=SCALE)
    if fills == "during the save":  # something else takes the room that was there when it was looked for
        monkeypatch.setattr("megagpt.checkpoint.fsio.free_bytes", lambda folder: 10**12)
    with saver(store, state, told, asynchronous=asynchronous, keep_last=1) as by:
        by.save({"step": 10})
        state.set(20)
        by.save({"step": 20})
        state.set(21)
        by.settle()
        assert check_whole(store, SCALE) == [10]
        (event,) = told.events
        expected = "and the disk has" if fills == "before the save" else "No space left on device"
        assert expected in event["cause"]
        assert [path.name for path in store.folder.iterdir()] == ["step_00000010"], "its room is free again"
        subprocess.run(["mount", "-o", f"remount,size={4 * SIZE}", str(disk)], check=True)
        state.set(23)
        assert by.is_due(23)
        by.save({"step": 23}, last=True)
    assert check_whole(store, SCALE) == [23]
