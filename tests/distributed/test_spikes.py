"""A loss spike is recorded, dropped or undone; skipped batches are the same ones whoever skips them."""

from __future__ import annotations

import pytest

from megagpt.train.skips import batch_of
from tests.distributed.faults import Fault, train_with_fault
from tests.distributed.processes import start, train_command
from tests.distributed.test_nonfinite import events
from tests.distributed.test_resume import files_of, published, refused, rows
from tests.tiny import run_words

SPIKE = Fault("noise", -1, 40, until=40)
"""Batch 40, so step 41 where nothing is skipped before it."""
USUAL = (
    "train.max_steps=60",
    "checkpoint.save_every=16",
    "optim.schedule=constant",
    "optim.lr=5e-3",
    "watch.spike_window=24",
    "checkpoint.keep_last=9",
    "log.progress=true",
)


def run(run_dir, tokens, *overrides, faults=(SPIKE,), world_size=2):
    words = run_words(run_dir, tokens, *USUAL, *overrides)
    group = start(train_with_fault, world_size, words, *faults, log=run_dir.with_suffix(".log"))
    return group.finish(120)


def test_a_rollback_undoes_the_spike_and_passes_over_its_batches(tokens, tmp_path):
    undone, skipped = tmp_path / "undone", tmp_path / "skipped"
    output = run(undone, tokens, "watch.on_spike=rollback")
    assert "back to step 32; batches 32 to 40 are passed over" in output
    (spike,) = events(undone, "spike")
    assert (spike["step"], spike["batch"], spike["action"]) == (41, 40, "rollback")
    (back,) = events(undone, "rollback")
    assert (back["to_step"], back["skipped_batches"]) == (32, [32, 41])
    run(skipped, tokens, "train.skip_batches=[[32, 41]]", faults=())
    assert published(undone) == published(skipped) == [16, 32, 48, 60]
    assert files_of(undone, 60) == files_of(skipped, 60)
    assert rows(undone) == rows(skipped)
    assert [event["batches"] for event in events(skipped, "skipped_batches")] == [[32, 41]]


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["parallel.zero_stage=3", "train.dtype=bf16", "parallel.pipeline=2"])
def test_a_rollback_that_is_stopped_and_resumed_ends_alike(layout, tokens, tmp_path):
    undone, skipped = tmp_path / "undone", tmp_path / "skipped"
    run(undone, tokens, "watch.on_spike=rollback", "train.max_steps=50", layout)
    run(undone, tokens, "watch.on_spike=rollback", layout)
    assert len(events(undone, "spike")) == 1
    run(skipped, tokens, "train.skip_batches=[[32, 41]]", layout, faults=())
    assert files_of(undone, 60) == files_of(skipped, 60)


@pytest.mark.exhaustive
@pytest.mark.parametrize("policy", ["record", "skip"])
def test_a_spike_is_recorded_or_its_update_dropped(policy, tokens, tmp_path):
    run_dir = tmp_path / "run"
    run(run_dir, tokens, f"watch.on_spike={policy}")
    (spike,) = events(run_dir, "spike")
    assert (spike["step"], spike["action"]) == (41, policy)
    assert "sigmas above the mean" in spike["reason"]
    assert [row["step"] for row in rows(run_dir) if row.get("skipped")] == ([41] if policy == "skip" else [])


@pytest.mark.exhaustive
def test_spikes_that_do_not_end_stop_the_run(tokens, tmp_path):
    words = run_words(tmp_path / "run", tokens, *USUAL, "watch.on_spike=skip", "watch.max_skips=2")
    group = start(train_with_fault, 2, words, Fault("noise", -1, 40, until=60), log=tmp_path / "log")
    assert group.wait(120) == [3, 3], group.output()
    assert "in a row, and watch.max_skips is 2" in group.output()


@pytest.mark.exhaustive
def test_batches_that_were_read_cannot_be_skipped_afterwards(tokens, tmp_path):
    run_dir = tmp_path / "run"
    run(run_dir, tokens, "train.max_steps=20", "train.skip_batches=[[5, 8]]", faults=())
    words = run_words(run_dir, tokens, *USUAL, "train.skip_batches=[[5, 8], [10, 12]]")
    refused(words, tmp_path / "late.log", "train.skip_batches", "[10, 12]", "before batch 23")
    words = run_words(run_dir, tokens, *USUAL, "train.skip_batches=[[30, 33]]", "train.max_steps=40")
    group = start(train_command, 2, words, log=tmp_path / "log")  # those of the history stay skipped
    group.finish()
    assert batch_of(39, ((5, 8), (30, 33))) == 45
    whole = tmp_path / "whole"
    run(whole, tokens, "train.max_steps=40", "train.skip_batches=[[5, 8], [30, 33]]", faults=())
    assert files_of(run_dir, 40) == files_of(whole, 40)
