"""SIGKILL in a save: what can be seen afterwards is whole, and nothing older is lost. Real processes."""

from __future__ import annotations

import random
import signal
import time

import pytest

from megagpt.checkpoint.store import CheckpointStore
from tests.checkpoint.folders import folder_in_memory
from tests.checkpoint.small_saves import check_whole
from tests.distributed.processes import Group, start
from tests.distributed.save_jobs import NEVER, save_and_die

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(900)]

LARGE = 20_000
"""Columns of a tensor, times: 1.4 MB a checkpoint, so that a part of the time goes into writing."""
MOMENTS = 200
"""Kills."""


@pytest.fixture
def store(tmp_path):
    with folder_in_memory(tmp_path) as folder:
        (folder / "run").mkdir()
        yield CheckpointStore(folder / "run" / "checkpoints")


def started(store, kind, world_size, *args):
    (store.folder.parent / "ready").unlink(missing_ok=True)
    log = store.folder.parent.parent / "log"
    return start(save_and_die, world_size, store.folder, kind, *args, log=log)


def check(store, before, scale, name):
    """What is seen is whole, and not less than it was."""
    seen = check_whole(store, scale)
    assert seen[-1:] >= before[-1:], f"{name}: {before} became {seen}"
    return seen


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_that_is_killed_before_any_call_of_a_save_breaks_nothing(world_size, kind, store):
    seen: list[int] = []
    for rank in sorted({0, world_size - 1}):
        k, codes = 0, [1]
        while codes != [0] * world_size:
            k += 1
            group = started(store, kind, world_size, rank, k, 1, 1)
            codes = group.wait(60)
            assert codes[rank] in (0, -signal.SIGKILL), group.output()[-2000:]
            seen = check(store, seen, 1, f"rank {rank} killed before its call {k}")
        assert k > (12 if rank == 0 else 4), "the last save must be one that no call of it was killed in"


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_that_are_killed_at_random_moments_break_nothing(world_size, kind, store):
    choose = random.Random(world_size)
    seen: list[int] = []
    unfinished = 0
    for number in range(MOMENTS):
        group = started(store, kind, world_size, 0, NEVER, 10**6, LARGE)
        wait_until_ready(store, group)
        time.sleep(choose.uniform(0, 0.05 * world_size))
        group.signal(signal.SIGKILL)
        seen = check(store, seen, LARGE, f"kill {number}")
        unfinished += bool(list(store.folder.glob("*.tmp")))
    assert seen[-1] > MOMENTS / 4
    assert unfinished > MOMENTS / 20, "kills must fall into saves"


def wait_until_ready(store, group: Group):
    until = time.monotonic() + 60
    while not (store.folder.parent / "ready").exists():
        assert time.monotonic() < until, group.output()
        time.sleep(0.001)
