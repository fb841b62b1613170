"""NaN and infinity on one rank alone, and a replica that differs: seen on all ranks, named, never saved."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from megagpt.checkpoint.store import verify_checkpoint
from megagpt.errors import TrainingDiverged
from tests.distributed.faults import Fault, train_with_fault
from tests.distributed.processes import start
from tests.distributed.test_resume import published, rows, step_dir
from tests.tiny import run_words

DIVERGED = TrainingDiverged.exit_code
STEP = 5
"""1-based: its batch is number 4, of which rank 1 has samples 34, 35 and then 38, 39."""
AGAIN = Fault("nan gradient", 1, STEP, until=STEP + 1)
"""Also where the step is computed once more."""

LAYOUTS = {
    "zero0": (["parallel.zero_stage=0"], "nan gradient"),
    "zero1": (["parallel.zero_stage=1"], "inf gradient"),
    "bf16-zero1": (["train.dtype=bf16"], "nan gradient"),
    "zero2": (["parallel.zero_stage=2"], "nan gradient"),
    "bf16-zero2": (["parallel.zero_stage=2", "train.dtype=bf16"], "inf gradient"),
    "zero3": (["parallel.zero_stage=3"], "nan gradient"),
    "bf16-zero3": (["parallel.zero_stage=3", "train.dtype=bf16"], "nan gradient"),
    "offload": (["parallel.zero_stage=2", "parallel.offload_optimizer=cpu"], "nan gradient"),
    "muon": (["parallel.zero_stage=1", "optim.name=muon"], "nan gradient"),
}
FAST = ("zero2",)


def run(tmp_path, tokens, faults, *overrides, world_size=2):
    words = run_words(tmp_path / "run", tokens, "checkpoint.save_every=2", "log.progress=true", *overrides)
    group = start(train_with_fault, world_size, words, *faults, log=tmp_path / "log")
    return group.wait(120), group.output(), tmp_path / "run"


def events(run_dir, name):
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in lines if event["event"] == name]


def saved_are_sound(run_dir):
    """Every checkpoint verifies, and all that it holds is finite."""
    for step in published(run_dir):
        verify_checkpoint(step_dir(run_dir, step))
        for path in step_dir(run_dir, step).glob("*.safetensors"):
            assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values())
    return published(run_dir)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in FAST else pytest.mark.exhaustive) for name in LAYOUTS]
)
def test_a_bad_gradient_on_one_rank_stops_all_before_the_update(layout, tokens, tmp_path):
    words, kind = LAYOUTS[layout]
    codes, output, run_dir = run(tmp_path, tokens, [Fault(kind, 1, STEP, until=STEP + 1)], *words)
    assert codes == [DIVERGED, DIVERGED], output
    assert "error: gradient norm is nan on rank 1 (samples 34, 35 of rank 1; in blocks.1." in output
    assert f"step {STEP} was not saved" in output
    (event,) = events(run_dir, "nonfinite")
    assert (event["step"], event["batch"], event["ranks"], event["action"]) == (STEP, STEP - 1, [1], "stop")
    assert event["samples"] == {"1": [34, 35]}
    assert event["parameters"][0].startswith("blocks.1.")  # backward came to it first
    assert saved_are_sound(run_dir) == [2, 4]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("layout", "rank", "blamed"),
    [
        (["parallel.tensor=2", "parallel.zero_stage=0"], 1, [1]),
        (["parallel.pipeline=2"], 0, [0]),
        (["parallel.pipeline=2"], 1, [1]),
        (["parallel.pipeline=2", "train.dtype=bf16"], 1, [1]),
        (["parallel.sequence=2"], 1, [1]),
    ],
    ids=["tensor", "stage0", "stage1", "stage1-bf16", "sequence"],
)
def test_a_bad_gradient_is_found_in_every_layout(layout, rank, blamed, tokens, tmp_path):
    codes, output, run_dir = run(tmp_path, tokens, [Fault("nan gradient", rank, STEP, until=STEP + 1)], *layout)
    assert codes == [DIVERGED, DIVERGED], output
    (event,) = events(run_dir, "nonfinite")
    assert event["ranks"] == blamed, output
    assert saved_are_sound(run_dir) == [2, 4]


@pytest.mark.exhaustive
def test_a_gradient_that_is_bad_only_once_is_told_from_one_that_is_bad_again(tokens, tmp_path):
    codes, output, _ = run(tmp_path, tokens, [Fault("nan gradient", 1, STEP, until=STEP)])
    assert codes == [DIVERGED, DIVERGED]
    assert "computed again it is finite on every rank" in output


@pytest.mark.parametrize(
    ("fault", "layout", "blamed", "samples"),
    [
        # Two micro-batches a step: call 10 is the second one of step 5.
        pytest.param(Fault("nan loss", 1, 10), [], [1], {"1": [38, 39]}, marks=pytest.mark.exhaustive),
        pytest.param(
            Fault("inf weight", 0, STEP), ["parallel.zero_stage=2"], [0], {"0": [32, 33, 36, 37]},
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            Fault("inf weight", 0, STEP), ["parallel.pipeline=2"], [0], {"0": [32, 33, 34, 35, 36, 37, 38, 39]},
            marks=pytest.mark.exhaustive,
        ),
    ],
)  # fmt: skip
def test_a_bad_loss_names_the_rank_and_its_micro_batches(fault, layout, blamed, samples, tokens, tmp_path):
    codes, output, run_dir = run(tmp_path, tokens, [fault], *layout)
    assert codes == [DIVERGED, DIVERGED], output
    (event,) = events(run_dir, "nonfinite")
    assert (event["what"], event["ranks"], event["samples"]) == ("loss", blamed, samples)
    assert f"error: loss is nan on rank {blamed[0]}" in output
    assert saved_are_sound(run_dir) == [2, 4]


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [1, 3])
def test_with_skip_the_run_goes_on(stage, tokens, tmp_path):
    words = [f"parallel.zero_stage={stage}", "watch.on_nonfinite=skip", "watch.max_skips=2"]
    codes, output, run_dir = run(tmp_path, tokens, [AGAIN], *words)
    assert codes == [0, 0], output
    assert [event["action"] for event in events(run_dir, "nonfinite")] == ["skip"]
    skipped = [row for row in rows(run_dir) if row.get("skipped")]
    assert [(row["step"], row["grad_norm"]) for row in skipped] == [(STEP, None)]
    assert f"step {STEP}: gradient norm is nan on rank 1" in output
    assert saved_are_sound(run_dir)[-1] == 12


@pytest.mark.exhaustive
def test_with_skip_too_many_in_a_row_stop_the_run(tokens, tmp_path):
    words = ["watch.on_nonfinite=skip", "watch.max_skips=2"]
    codes, output, run_dir = run(tmp_path, tokens, [Fault("nan loss", 0, 9)], *words)
    assert codes == [DIVERGED, DIVERGED], output
    assert "number 3 in a row (watch.max_skips is 2)" in output
    assert [event["action"] for event in events(run_dir, "nonfinite")] == ["skip", "skip", "stop"]
    assert saved_are_sound(run_dir)[-1] == 6


REPLICAS = [
    (2, [], "flipped bit", 1, "blocks.1.attention.output.weight of rank 1 and of rank 0", [0, 1]),
    (3, ["parallel.zero_stage=2"], "flipped bit", 1, "of rank 1, which 2 others agree on", [1]),
    (4, ["train.dtype=bf16"], "flipped bit", 3, "of rank 3, which 3 others agree on", [3]),
    (3, ["parallel.zero_stage=0"], "flipped bit in step", 2, "of rank 2, which 2 others agree on", [2]),
    (2, ["parallel.zero_stage=3"], "inf weight after update", 1, "of rank 1 is not finite", [1]),
]


@pytest.mark.parametrize(
    ("world_size", "layout", "kind", "rank", "expected", "blamed"),
    [REPLICAS[1], *(pytest.param(*one, marks=pytest.mark.exhaustive) for one in (REPLICAS[0], *REPLICAS[2:]))],
)
def test_a_replica_that_differs_is_named_and_not_saved(
    world_size, layout, kind, rank, expected, blamed, tokens, tmp_path
):
    sizes = ["train.global_batch_size=12", "train.micro_batch_size=1", "checkpoint.save_every=0"]
    faults = [Fault(kind, rank, 2 if "step" not in kind else 4, 2 if "step" not in kind else 4)]
    words = ["watch.replicas_every=3", "train.max_steps=30", *sizes, *layout]
    codes, output, run_dir = run(tmp_path, tokens, faults, *words, world_size=world_size)
    assert codes == [DIVERGED] * world_size, output
    assert expected in output
    (event,) = events(run_dir, "diverged")
    assert event["step"] == 6
    assert sorted({rank for one in event["findings"] for rank in one["ranks"]}) == blamed
    assert published(run_dir) == []


@pytest.mark.exhaustive
def test_a_bad_weight_is_refused_by_the_save(tokens, tmp_path):
    """Only one rank holds this part of it: there is no replica to compare with."""
    words = ["parallel.zero_stage=3", "watch.replicas_every=0"]
    codes, output, run_dir = run(tmp_path, tokens, [Fault("inf weight after update", 1, 2)], *words)
    assert codes == [DIVERGED, DIVERGED], output
    assert "weights are no numbers" in output
    assert saved_are_sound(run_dir) == [2]
