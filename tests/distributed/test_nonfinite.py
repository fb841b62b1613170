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

FP16 = ("train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 8, hysteresis: 1}}")
FIXED = ("train.dtype=fp16", "parallel.extra={fp16: {loss_scale: 256}}")
"""Scales at which nothing overflows in these runs."""

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
    "fp16-zero1": (["parallel.zero_stage=1", *FP16], "inf gradient"),
    "fp16-zero2": (["parallel.zero_stage=2", *FP16], "nan gradient"),
    "fp16-zero3": (["parallel.zero_stage=3", *FP16], "nan gradient"),
    "fp16-fixed-zero1": (["parallel.zero_stage=1", *FIXED], "nan gradient"),
    "fp16-fixed-zero2": (["parallel.zero_stage=2", *FIXED], "inf gradient"),
    "fp16-fixed-zero3": (["parallel.zero_stage=3", *FIXED], "nan gradient"),
    "fp16-offload": (["parallel.zero_stage=2", "parallel.offload_optimizer=cpu", *FP16], "nan gradient"),
    "fp16-smallest": (["train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 0}}"], "nan gradient"),
}
FAST = ("zero2", "fp16-zero2", "fp16-fixed-zero1")


def run(tmp_path, tokens, faults, *overrides, world_size=2):
    words = run_words(tmp_path / "run", tokens, "checkpoint.save_every=2", "log.progress=true", *overrides)
    allowed = Fault("fp16 on the CPU", -1, 1)
    group = start(train_with_fault, world_size, words, allowed, *faults, log=tmp_path / "log")
    return group.wait(240), group.output(), tmp_path / "run"


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
    assert "Traceback" not in output
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
        (["parallel.pipeline=2", *FP16], 0, [0]),
        (["parallel.tensor=2", *FP16], 1, [1]),
    ],
    ids=["tensor", "stage0", "stage1", "stage1-bf16", "sequence", "stage0-fp16", "tensor-fp16"],
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


def skipped_and_scales(run_dir):
    """(steps without an update, the loss scale after each step)."""
    told = rows(run_dir)
    return [row["step"] for row in told if row["skipped"]], [row["loss_scale"] for row in told]


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_is_the_loss_scales_and_no_event(stage, tokens, tmp_path):
    words = ["train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 24, hysteresis: 1}}"]
    codes, output, run_dir = run(tmp_path, tokens, [], f"parallel.zero_stage={stage}", *words)
    assert codes == [0, 0], output
    skipped, scales = skipped_and_scales(run_dir)
    assert 3 < len(skipped) < 12  # more than watch.max_skips
    assert scales[-1] == 2.0 ** (24 - len(skipped))
    assert events(run_dir, "nonfinite") == []
    assert saved_are_sound(run_dir)[-1] == 12


@pytest.mark.exhaustive
def test_five_hundred_steps_at_the_edge_of_fp16_raise_no_alarm(tokens, tmp_path):
    words = ["train.dtype=fp16", "parallel.zero_stage=2", "parallel.extra={fp16: {loss_scale_window: 20}}"]
    words += ["train.max_steps=500", "checkpoint.save_every=0", "watch.replicas_every=1", "log.progress=false"]
    codes, output, run_dir = run(tmp_path, tokens, [], *words)
    assert codes == [0, 0], output
    skipped, scales = skipped_and_scales(run_dir)
    assert 5 < len(skipped) < 100
    assert max(scales) > 2**16
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["started", "saved", "finished"]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("scale", "key"),
    [
        ("{loss_scale: 1073741824}", "parallel.extra.fp16.loss_scale"),
        ("{initial_scale_power: 30, min_loss_scale: 1073741824}", "parallel.extra.fp16.min_loss_scale"),
    ],
    ids=["fixed", "smallest"],
)
def test_an_overflow_that_no_smaller_scale_can_mend_stops_the_run(scale, key, tokens, tmp_path):
    words = ["train.dtype=fp16", f"parallel.extra={{fp16: {scale}}}"]
    codes, output, run_dir = run(tmp_path, tokens, [], *words)
    assert codes == [DIVERGED, DIVERGED], output
    assert "with a loss scale of 1 it is finite" in output
    assert key in output
    assert "Traceback" not in output
    (event,) = events(run_dir, "nonfinite")
    assert (event["step"], event["action"]) == (1, "stop")
    assert event["loss_scale"] == 2.0**30
    assert published(run_dir) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("scale", [FP16, FIXED], ids=["dynamic", "fixed"])
def test_with_skip_fp16_goes_on_with_the_scale_it_had(scale, tokens, tmp_path):
    words = [*scale, "watch.on_nonfinite=skip", "watch.max_skips=2"]
    codes, output, run_dir = run(tmp_path, tokens, [AGAIN], *words)
    assert codes == [0, 0], output
    (event,) = events(run_dir, "nonfinite")
    assert (event["step"], event["ranks"], event["action"]) == (STEP, [1], "skip")
    assert skipped_and_scales(run_dir) == ([STEP], [256.0] * 12)
    assert saved_are_sound(run_dir)[-1] == 12


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "at", "scale"),
    [
        ("nan gradient", STEP, FP16),
        ("nan gradient", STEP, FIXED),
        ("nan loss", 2 * STEP - 1, FP16),
        ("nan loss", 2 * STEP - 1, ("train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 0}}")),
    ],
    ids=["dynamic", "fixed", "loss", "loss-smallest"],
)
def test_with_skip_too_many_in_a_row_stop_an_fp16_run(kind, at, scale, tokens, tmp_path):
    words = [*scale, "watch.on_nonfinite=skip", "watch.max_skips=2"]
    codes, output, run_dir = run(tmp_path, tokens, [Fault(kind, 1, at)], *words)
    assert codes == [DIVERGED, DIVERGED], output
    assert "Traceback" not in output
    assert "number 3 in a row (watch.max_skips is 2)" in output
    told = events(run_dir, "nonfinite")
    assert [(event["step"], event["action"]) for event in told] == [(5, "skip"), (6, "skip"), (7, "stop")]
    assert {tuple(event["ranks"]) for event in told} == {(1,)}
    skipped, scales = skipped_and_scales(run_dir)
    assert skipped == [5, 6]
    assert len(set(scales)) == 1
    assert saved_are_sound(run_dir)[-1] == 6  # it has the weights of step 4


TWO = "blocks.1.attention.output.weight of rank 1 and of rank 0"
REPLICAS = {
    "zero0": (3, ["parallel.zero_stage=0"], "flipped bit in step", 2, "of rank 2, which 2 others agree on", [2]),
    "zero1": (2, ["parallel.zero_stage=1"], "flipped bit in step", 1, TWO, [0, 1]),
    "zero2": (3, ["parallel.zero_stage=2"], "flipped bit in step", 1, "of rank 1, which 2 others agree on", [1]),
    "zero2-late": (3, ["parallel.zero_stage=2"], "flipped bit after forward", 0, "of rank 0, which 2 others", [0]),
    "zero3": (3, ["parallel.zero_stage=3"], "flipped bit in step", 1, "of rank 1, which 2 others agree on", [1]),
    "bf16-zero1": (4, ["train.dtype=bf16"], "flipped bit in step", 3, "of rank 3, which 3 others agree on", [3]),
    "bf16-zero2": (
        3, ["train.dtype=bf16", "parallel.zero_stage=2"], "flipped bit in step", 0, "of rank 0, which 2 others", [0]
    ),
    "bf16-late": (3, ["train.dtype=bf16"], "flipped bit after forward", 2, "of rank 2, which 2 others", [2]),
    "fp16-zero1": (3, FP16, "flipped bit in step", 2, "of rank 2, which 2 others agree on", [2]),
    "offload": (
        3, ["parallel.zero_stage=2", "parallel.offload_optimizer=cpu"], "flipped bit in step", 1, "of rank 1, wh", [1]
    ),
    "muon": (3, ["parallel.zero_stage=1", "optim.name=muon"], "flipped bit in step", 1, "of rank 1, which 2", [1]),
    "pipeline": (4, ["parallel.pipeline=2"], "flipped bit in step", 3, "of rank 3 and of rank 2", [2, 3]),
    "tensor": (4, ["parallel.tensor=2"], "flipped bit in step", 3, "of rank 3 and of rank 1", [1, 3]),
}  # fmt: skip
SMALL = ("train.global_batch_size=12", "train.micro_batch_size=1")


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "zero2" else pytest.mark.exhaustive) for name in REPLICAS]
)
def test_a_replica_that_differs_within_a_step_is_named_before_its_update(layout, tokens, tmp_path):
    """The update of ZeRO-1 and 2 overwrites the weight; what was computed with it would stay."""
    world_size, words, kind, rank, expected, blamed = REPLICAS[layout]
    words = ["watch.replicas_every=3", "checkpoint.save_every=0", "train.max_steps=30", *SMALL, *words]
    codes, output, run_dir = run(tmp_path, tokens, [Fault(kind, rank, 6, 6)], *words, world_size=world_size)
    assert codes == [DIVERGED] * world_size, output
    assert expected in output
    (event,) = events(run_dir, "diverged")
    assert event["step"] == rows(run_dir)[-1]["step"] == 5  # the last one that counts
    assert sorted({rank for one in event["findings"] for rank in one["ranks"]}) == blamed
    assert {one["tensor"] for one in event["findings"]} == {"blocks.1.attention.output.weight"}
    assert published(run_dir) == []


TIED = {
    "data": [],
    "bf16": ["train.dtype=bf16"],
    "fp16": list(FP16),
    "offload": ["parallel.offload_optimizer=cpu"],
    "bf16-offload": ["train.dtype=bf16", "parallel.offload_optimizer=cpu"],
    "tensor": ["parallel.tensor=2"],
}


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name == "data" else pytest.mark.exhaustive) for name in TIED]
)
def test_a_tied_head_stays_what_the_embedding_is(layout, tokens, tmp_path):
    """They lie at different places of what their stages update; the last elements are another loop's."""
    words = ["watch.replicas_every=1", "checkpoint.save_every=0", "train.max_steps=60", *SMALL, *TIED[layout]]
    codes, output, run_dir = run(tmp_path, tokens, [], *words, "parallel.pipeline=2", world_size=4)
    assert codes == [0] * 4, output
    assert rows(run_dir)[-1]["step"] == 60


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", [["parallel.zero_stage=2"], ["train.dtype=bf16"]], ids=["zero2", "bf16"])
@pytest.mark.parametrize("ends", ["save_every", "last", "asked to stop"])
def test_a_replica_that_differs_in_the_step_before_a_save_is_not_saved(words, ends, tokens, tmp_path):
    steps = {"save_every": ["checkpoint.save_every=4"], "last": ["train.max_steps=4"]}.get(ends, [])
    faults = [Fault("flipped bit in step", 1, 4, 4)]
    faults += [Fault("asked to stop", 0, 4, 4)] if ends == "asked to stop" else []
    words = ["watch.replicas_every=0", "checkpoint.save_every=0", *SMALL, *words, *steps]
    codes, output, run_dir = run(tmp_path, tokens, faults, *words, world_size=3)
    assert codes == [DIVERGED] * 3, output
    assert "of rank 1, which 2 others agree on" in output
    assert published(run_dir) == []


@pytest.mark.exhaustive
def test_without_zero_a_replica_stays_different_until_a_comparison_finds_it(tokens, tmp_path):
    words = ["parallel.zero_stage=0", "watch.replicas_every=3", "checkpoint.save_every=0", *SMALL]
    codes, output, run_dir = run(tmp_path, tokens, [Fault("flipped bit in step", 2, 4, 4)], *words, world_size=3)
    assert codes == [DIVERGED] * 3, output
    assert events(run_dir, "diverged")[0]["step"] == 5


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["flipped bit", "inf weight after update"])
def test_a_replica_that_differs_after_the_update_is_not_saved(kind, tokens, tmp_path):
    """The second comparison of the step before a save."""
    words = ["parallel.zero_stage=0", "watch.replicas_every=0", "checkpoint.save_every=4", *SMALL]
    codes, output, run_dir = run(tmp_path, tokens, [Fault(kind, 2, 2, 2)], *words, world_size=3)
    assert codes == [DIVERGED] * 3, output
    assert "of rank 2" in output
    assert events(run_dir, "diverged")[0]["step"] == 4
    assert published(run_dir) == []


@pytest.mark.exhaustive
def test_a_bad_weight_is_refused_by_the_save(tokens, tmp_path):
    """Only one rank holds this part of it: there is no replica to compare with."""
    words = ["parallel.zero_stage=3", "watch.replicas_every=0"]
    codes, output, run_dir = run(tmp_path, tokens, [Fault("inf weight after update", 1, 4)], *words)
    assert codes == [DIVERGED, DIVERGED], output
    assert "weights are no numbers" in output
    assert saved_are_sound(run_dir) == [2]
