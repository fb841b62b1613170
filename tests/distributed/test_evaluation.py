"""Validation loss does not depend on how many processes share the sequences, also where they do not divide."""

from __future__ import annotations

import json

import pytest

from tests.distributed.processes import start, train_command
from tests.tiny import run_words


def validation_losses(run_dir, world_size, tokens, val_tokens, log):
    words = run_words(
        run_dir,
        tokens,
        f"data.val={val_tokens}",
        "eval.every=1",
        "eval.sequences=7",
        "train.max_steps=4",
        "parallel.zero_stage=3",
    )
    start(train_command, world_size, words, log=log).finish()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["val_loss"], row["val_tokens"]) for row in rows if "val_loss" in row]


def test_an_odd_number_of_sequences_gives_the_same_loss_on_one_process_and_on_two(tmp_path, tokens, val_tokens):
    one = validation_losses(tmp_path / "one", 1, tokens, val_tokens, tmp_path / "one.log")
    two = validation_losses(tmp_path / "two", 2, tokens, val_tokens, tmp_path / "two.log")
    assert [step for step, _, _ in one] == [0, 1, 2, 3, 4]
    assert [(step, n) for step, _, n in one] == [(step, n) for step, _, n in two]
    assert [loss for _, loss, _ in two] == pytest.approx([loss for _, loss, _ in one], rel=1e-6)
