"""One rank's full disk is every rank's failed save: nobody waits, nothing is published, and the run goes on."""

from __future__ import annotations

import json
import os

import pytest

from tests.distributed.processes import start
from tests.distributed.save_jobs import FAILURES, save_until_no_call_is_left


@pytest.mark.parametrize(
    ("world_size", "failure", "times"),
    [
        (2, "ENOSPC", "once"),
        *(
            pytest.param(world_size, failure, times, marks=pytest.mark.exhaustive)
            for world_size in (2, 4)
            for failure in FAILURES
            for times in ("once", "from then on")
            if (world_size, failure, times) != (2, "ENOSPC", "once")
        ),
    ],
)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_disk_that_fails_at_any_call_of_any_rank_is_told_on_all_and_the_next_save_works(
    kind, world_size, failure, times, tmp_path
):
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    ranks = sorted({0, 1, world_size - 1})
    start(save_until_no_call_is_left, world_size, folder, kind, failure, times, ranks, log=tmp_path / "log").finish(200)
    by_rank = [json.loads((folder.parent / f"told_{rank}.json").read_text()) for rank in range(world_size)]
    cause = os.strerror(FAILURES[failure]().errno)
    for attempts in zip(*by_rank, strict=True):
        events = attempts[0]["events"]
        assert all(told["events"] == events for told in attempts), "all ranks are told the same"
        for event in events:
            assert cause in event["cause"]
            assert event["step"] == attempts[0]["step"]
            if event["event"] == "save_failed" and attempts[0]["rank"] > 0:
                assert f"rank {attempts[0]['rank']}: " in event["cause"]
            if event["event"] == "save_failed" and times == "once":
                assert not any(name.endswith(".tmp") for name in attempts[0]["left"]), "its room is free again"
    calls = {rank: max(told["k"] for told in by_rank[0] if told["rank"] == rank) - 1 for rank in ranks}
    assert calls[0] >= 18, "folders, files, manifest, renames, removal of the older checkpoint"
    assert all(calls[rank] >= 4 for rank in ranks), "open, header, tensors, flush"
