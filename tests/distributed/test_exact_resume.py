"""Stopped and started again, a run is the unbroken one to the last bit, in every layout: the real command.

With dropout, validation, few samples, so that the end of the data is passed on both sides of the restart, and one or
several micro-batches a step.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass

import pytest

from megagpt.config.load import load_arguments
from megagpt.config.schema import TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.parallel.plan import is_legal
from tests.distributed.runs import metric_rows, saved_state, step_dir, train_to_the_end
from tests.tiny import run_words, write_tokens

STOPPED_AT, LAST, BATCH = 6, 12, 8


@dataclass(frozen=True)
class Case:
    """A layout with a precision and a number of micro-batches a step."""

    layout: str
    world_size: int
    words: tuple[str, ...]
    accumulation: int
    dtype: str

    @property
    def name(self):
        return f"{self.layout}-acc{self.accumulation}-{self.dtype}"

    def command(self, run_dir, tokens, val_tokens):
        model_parallel = 1
        for word in self.words:
            key, _, value = word.partition("=")
            model_parallel *= int(value) if key in ("parallel.tensor", "parallel.pipeline", "parallel.sequence") else 1
        micro = BATCH // (self.world_size // model_parallel) // self.accumulation
        return run_words(
            run_dir,
            tokens,
            f"train.max_steps={LAST}",
            f"train.global_batch_size={BATCH}",
            f"train.micro_batch_size={micro}",
            f"train.dtype={self.dtype}",
            f"checkpoint.save_every={STOPPED_AT}",
            "model.dropout=0.1",
            f"data.val={val_tokens}",
            "eval.every=4",
            "eval.sequences=8",
            *self.words,
        )


TP, PP, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=2"
LAYOUTS = {
    "plain": (1, ()),
    "zero0": (2, ("parallel.zero_stage=0",)),
    "zero1": (2, ()),
    "zero2": (2, ("parallel.zero_stage=2",)),
    "zero3": (2, ("parallel.zero_stage=3",)),
    "tp2": (2, (TP,)),
    "tp2-ts": (2, (TP, "parallel.tensor_sequence=true")),
    "pp2": (2, (PP,)),
    "sp2": (2, (SP, "parallel.zero_stage=2")),
    "tp2-pp2": (4, (TP, PP)),
}
CASES = [
    Case(name, world_size, words, accumulation, dtype)
    for name, (world_size, words) in LAYOUTS.items()
    for accumulation in (1, 4)
    for dtype in ("fp32", "bf16")
    if (name, dtype) != ("zero0", "bf16")  # refused
]
FAST = [case for case in CASES if case.name in ("tp2-ts-acc1-bf16", "pp2-acc4-fp32")]


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory):
    return write_tokens(tmp_path_factory.mktemp("few") / "train", n_documents=10, seed=3)


def check(case, tmp_path, tokens, val_tokens):
    run_dir = tmp_path / "run"
    words = case.command(run_dir, tokens, val_tokens)
    config = load_arguments(TrainingRun, words)
    mixture = open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)
    (share,) = mixture.describe(BATCH * STOPPED_AT)
    assert share.epochs > 2  # stopped inside a later epoch
    assert share.epochs % 1 > 0
    assert is_legal(config, case.world_size)
    train_to_the_end(words, tmp_path / "log", case.world_size)
    unbroken, metrics = saved_state(step_dir(run_dir, LAST)), metric_rows(run_dir)
    shutil.rmtree(step_dir(run_dir, LAST))  # as if it had been killed before the last save
    train_to_the_end(words, tmp_path / "log2", case.world_size)
    assert saved_state(step_dir(run_dir, LAST)) == unbroken
    assert metric_rows(run_dir) == metrics
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, LAST + 1))
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events if event["event"] == "resumed"] == [
        ("resumed", STOPPED_AT)
    ]


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_resume_is_exact(case, tmp_path, few_tokens, val_tokens):
    check(case, tmp_path, few_tokens, val_tokens)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case in CASES if case not in FAST], ids=lambda case: case.name)
def test_resume_is_exact_in_every_layout(case, tmp_path, few_tokens, val_tokens):
    check(case, tmp_path, few_tokens, val_tokens)
