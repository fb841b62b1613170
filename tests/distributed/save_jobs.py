"""What each of several ranks does in the tests of saving."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import torch

from megagpt.checkpoint.store import CheckpointStore
from megagpt.parallel.mesh import Mesh
from tests.checkpoint.faults import failing_at, io_error, killed_for_good, no_space, over_quota, too_many_files
from tests.checkpoint.small_saves import State, Told, saver

FAILURES = {"ENOSPC": no_space, "EIO": io_error, "EDQUOT": over_quota, "EMFILE": too_many_files}
NEVER = 10**9


def join() -> Mesh:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Mesh(rank, world_size, rank, torch.device("cpu"))


def save_until_no_call_is_left(folder: Path, kind: str, failure: str, times: str, ranks: list[int]) -> None:
    """For each of these ranks, and k from 1 on: its k-th call of a save fails; then the next save succeeds.

    Every rank writes what it was told, a row an attempt.
    """
    mesh = join()
    told: list[dict[str, object]] = []
    step = 0
    state, story = State(0, mesh), Told()
    store = CheckpointStore(folder)
    with saver(store, state, story, asynchronous=kind == "async", keep_last=1, make_room=False) as by:
        for failing_rank in ranks:
            k, failed = 0, True
            while failed:
                k += 1
                step += 10
                state.set(step)
                with failing_at(k if mesh.rank == failing_rank else NEVER, FAILURES[failure], once=times == "once"):
                    by.save({"step": step})
                    by.settle()
                failed = bool(mesh.sum(float(len(story.events)))[0])
                left = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
                told.append({"rank": failing_rank, "k": k, "events": story.events, "left": left, "step": step})
                story.events = []
                mesh.barrier()
                step += 10
                state.set(step)
                by.save({"step": step})
                by.settle()
                assert not story.events, story.events
                assert store.steps() == [step]
                mesh.barrier()
    (folder.parent / f"told_{mesh.rank}.json").write_text(json.dumps(told))
    mesh.barrier()


def save_and_die(folder: Path, kind: str, rank_that_dies: int, k: int, n_saves: int, scale: int) -> None:
    """Save the steps after the newest; SIGKILL this process before the k-th call that one rank makes."""
    mesh = join()
    store = CheckpointStore(folder)
    first = max(mesh.gather(store.steps() or [0])[0]) + 1
    state = State(first, mesh, scale)
    with saver(store, state, Told(), asynchronous=kind == "async", keep_last=2) as by:
        if mesh.is_main:
            (folder.parent / "ready").touch()
        with failing_at(k if mesh.rank == rank_that_dies else NEVER, killed_for_good):
            for step in range(first, first + n_saves):
                state.set(step)
                by.save({"step": step})
            by.settle()
    mesh.barrier()
