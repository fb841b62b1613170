"""fp16 follows fp32, with megagpt/engine/corrections.py and not without; the loss scale survives a restart."""

from __future__ import annotations

import pytest
import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import KINDS, SliceReader
from tests.distributed.jobs import Job, read_measured, run_jobs
from tests.distributed.processes import start
from tests.tiny import run_config

STEPS, STOPPED_AT, WINDOW = 20, 11, 5
STAGES = pytest.mark.parametrize("stage", [1, 3])


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("fp16")


@pytest.fixture(scope="module")
def measured(where, tokens):
    def config(stage, dtype="fp16", scaler=f"{{loss_scale_window: {WINDOW}, initial_scale_power: 10}}"):
        extra = [f"parallel.extra={{fp16: {scaler}}}"] if dtype == "fp16" else []
        # A learning rate and a model in which half an update at the wrong time shows.
        words = [f"train.max_steps={STEPS}", f"parallel.zero_stage={stage}", f"train.dtype={dtype}", *extra]
        return run_config(where / "unused", tokens, *words, "optim.grad_clip=0")

    jobs = []
    for stage in (1, 3):
        half = CheckpointStore(where / f"half{stage}").step_dir(STOPPED_AT)
        jobs += [
            Job(f"fp32-{stage}", config(stage, "fp32"), STEPS),
            Job(f"fp16-{stage}", config(stage), STEPS, save=where / f"whole{stage}"),
            Job(f"uncorrected-{stage}", config(stage), STEPS, without="fp16 scale"),
            Job(f"half-{stage}", config(stage), STOPPED_AT, save=where / f"half{stage}"),
            Job(f"resumed-{stage}", config(stage), STEPS, load=half, save=where / f"resumed{stage}"),
            Job(f"fixed-{stage}", config(stage, scaler="{loss_scale: 256}"), STOPPED_AT, save=where / f"fixed{stage}"),
            Job(
                f"fixed-resumed-{stage}",
                config(stage, scaler="{loss_scale: 512}"),
                STEPS,
                load=CheckpointStore(where / f"fixed{stage}").step_dir(STOPPED_AT),
            ),
            Job(f"overflowing-{stage}", config(stage, scaler="{initial_scale_power: 24, hysteresis: 1}"), STEPS),
        ]
    start(run_jobs, 2, jobs, where / "out.json", log=where / "log").finish()
    return read_measured(where / "out.json")


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
    folders = [CheckpointStore(where / f"{name}{stage}").step_dir(STEPS) for name in ("whole", "resumed")]
    with (
        SliceReader(rank_files(folders[0], read_manifest(folders[0]))) as one,
        SliceReader(rank_files(folders[1], read_manifest(folders[1]))) as other,
    ):
        for name in one.shapes:
            for kind in KINDS:
                assert torch.equal(one.read_whole(name, kind), other.read_whole(name, kind)), (name, kind)


@STAGES
def test_a_fixed_loss_scale_is_the_configurations_also_after_a_restart(stage, measured):
    assert set(measured[f"fixed-{stage}"].loss_scales) == {256.0}
    assert set(measured[f"fixed-resumed-{stage}"].loss_scales) == {512.0}
    assert distance(measured[f"fixed-resumed-{stage}"].losses, measured[f"fp32-{stage}"].losses[STOPPED_AT:]) < 5e-3


@STAGES
def test_overflowing_steps_are_told_and_not_counted_as_updates(stage, measured):
    overflowing = measured[f"overflowing-{stage}"]
    n_skipped = sum(overflowing.skipped)
    assert 0 < n_skipped < STEPS
    assert overflowing.engine_state["adam_step"] == STEPS - n_skipped
    assert overflowing.engine_state["loss_scale"] == 2.0 ** (24 - n_skipped)
    assert [norm != norm for norm in overflowing.grad_norms] == overflowing.skipped
