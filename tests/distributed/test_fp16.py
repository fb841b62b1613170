"""fp16 follows fp32, with megagpt/engine/corrections.py and not without; the loss scale survives a restart."""

from __future__ import annotations

import pytest

from megagpt.checkpoint.store import CheckpointStore
from tests.distributed.jobs import Job
from tests.distributed.layouts import STEPS, Layout, check_equal, logical_tensors, measure

STOPPED_AT, WINDOW, FIXED_FOR = 11, 5, 4
STAGES = pytest.mark.parametrize("stage", [1, 3])


def layout(stage):
    return Layout(data=2, zero=stage, accumulation=2)


@pytest.fixture(scope="module")
def measured(where, configured):
    def config(stage, dtype="fp16", scaler=f"{{loss_scale_window: {WINDOW}, initial_scale_power: 10}}"):
        extra = [f"parallel.extra={{fp16: {scaler}}}"] if dtype == "fp16" else []
        # A learning rate and a model in which half an update at the wrong time shows.
        model = ("model.n_head=2", "model.d_model=24")
        return configured(layout(stage), *model, f"train.dtype={dtype}", *extra, "optim.grad_clip=0")

    jobs = []
    for stage in (1, 3):
        whole, half, fixed = (where / f"{name}{stage}" for name in ("whole", "half", "fixed"))
        load_half, load_fixed = (CheckpointStore(half).step_dir(STOPPED_AT), CheckpointStore(fixed).step_dir(FIXED_FOR))
        wide, narrow = config(stage, scaler="{loss_scale: 512}"), config(stage, scaler="{loss_scale: 256}")
        jobs += [
            Job(f"fp32-{stage}", config(stage, "fp32"), STEPS),
            Job(f"fp16-{stage}", config(stage), STEPS, save=whole, save_first=half, first_steps=STOPPED_AT),
            Job(f"uncorrected-{stage}", config(stage), STEPS, without="fp16 scale"),
            Job(f"resumed-{stage}", config(stage), STEPS, load=load_half, save=where / f"resumed{stage}"),
            Job(f"fixed-{stage}", narrow, FIXED_FOR, save=fixed),
            Job(f"fixed-resumed-{stage}", wide, FIXED_FOR + 3, load=load_fixed),
            Job(f"overflowing-{stage}", config(stage, scaler="{initial_scale_power: 24, hysteresis: 1}"), STEPS),
        ]
    return measure([(layout(1), job) for job in jobs], where)


def distance(found, expected):
    return max(abs(f - e) for f, e in zip(found, expected, strict=True))


@STAGES
def test_fp16_follows_fp32_while_the_loss_scale_grows(stage, measured):
    fp16, fp32 = measured[f"fp16-{stage}"], measured[f"fp32-{stage}"]
    assert distance(fp16.losses, fp32.losses) < 5e-3
    assert fp16.grad_norms == pytest.approx(fp32.grad_norms, rel=2e-2)
    assert fp16.loss_scales[-1] == fp16.loss_scales[0] * 2 ** ((STEPS - 1) // WINDOW)  # not at the first full window
    assert not any(fp16.skipped)


@STAGES
def test_without_the_correction_fp16_does_not_follow_so_it_is_still_needed(stage, measured):
    """Where this fails after an upgrade of DeepSpeed, megagpt/engine/corrections.py may go."""
    corrected, uncorrected = measured[f"fp16-{stage}"], measured[f"uncorrected-{stage}"]
    fp32 = measured[f"fp32-{stage}"]
    assert distance(uncorrected.losses, fp32.losses) > 2 * distance(corrected.losses, fp32.losses)


@STAGES
def test_a_resumed_run_has_the_loss_scale_and_the_weights_of_the_unbroken_one(stage, measured, where):
    whole, resumed = measured[f"fp16-{stage}"], measured[f"resumed-{stage}"]
    assert resumed.losses == whole.losses[STOPPED_AT:]
    assert resumed.loss_scales == whole.loss_scales[STOPPED_AT:]
    assert resumed.engine_state == whole.engine_state
    check_equal(*(logical_tensors(where / f"{name}{stage}", STEPS) for name in ("resumed", "whole")))


@STAGES
def test_a_fixed_loss_scale_is_the_configurations_also_after_a_restart(stage, measured):
    assert set(measured[f"fixed-{stage}"].loss_scales) == {256.0}
    assert set(measured[f"fixed-resumed-{stage}"].loss_scales) == {512.0}
    expected = measured[f"fp32-{stage}"].losses[FIXED_FOR : FIXED_FOR + 3]
    assert distance(measured[f"fixed-resumed-{stage}"].losses, expected) < 5e-3


@STAGES
def test_overflowing_steps_are_told_and_not_counted_as_updates(stage, measured):
    overflowing = measured[f"overflowing-{stage}"]
    n_skipped = sum(overflowing.skipped)
    assert 0 < n_skipped < STEPS
    assert overflowing.engine_state["adam_step"] == STEPS - n_skipped
    assert overflowing.engine_state["loss_scale"] == 2.0 ** (24 - n_skipped)
    assert [norm != norm for norm in overflowing.grad_norms] == overflowing.skipped
