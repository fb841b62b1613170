"""One rank's full disk is every rank's error: nobody waits, nothing is published."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch

from megagpt.checkpoint.save import save_checkpoint
from megagpt.checkpoint.store import CheckpointStore
from megagpt.errors import CheckpointError
from megagpt.parallel.mesh import Mesh
from tests.checkpoint.faults import failing_at, no_space
from tests.checkpoint.small_saves import identity, slices
from tests.distributed.processes import start

REFUSED = 7


def save_with_a_full_disk(folder, rank_that_fails, call):
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = int(os.environ["RANK"])
    mesh = Mesh(rank, 2, rank, torch.device("cpu"))
    try:
        with failing_at(call, no_space) if rank == rank_that_fails else nullcontext():
            save_checkpoint(CheckpointStore(folder), mesh, slices(1), {"step": 1}, identity())
    except CheckpointError as error:
        sys.stdout.write(f"{error}\n")
        return REFUSED
    return 0


@pytest.mark.parametrize(
    ("rank", "call", "message"),
    [
        (1, 1, "not saved: rank 1: "),  # opening its own file
        (1, 5, "not saved: rank 1: "),  # in the middle of it
        (0, 1, "not saved: "),  # making the folder
        (0, 12, "not saved: "),  # the manifest
    ],
)
def test_all_ranks_refuse_together(rank, call, message, tmp_path):
    group = start(save_with_a_full_disk, 2, tmp_path / "checkpoints", rank, call, log=tmp_path / "log")
    assert group.wait(60) == [REFUSED, REFUSED], group.output()
    lines = group.output().splitlines()
    told = [line for line in lines if "not saved" in line]
    assert len(told) == 2
    assert all(message in line and "No space left on device" in line for line in told)
    assert CheckpointStore(tmp_path / "checkpoints").steps() == []
