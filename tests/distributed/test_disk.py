"""Optimizer state on disk under ZeRO-3: the same training, and an error where a disk does not do what it is asked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint.store import CheckpointStore
from megagpt.engine.disk import ScratchFile
from megagpt.errors import ConfigError
from tests.distributed import layouts
from tests.distributed.disk_jobs import look_at_state, move_through
from tests.distributed.jobs import Job
from tests.distributed.layouts import STEPS, Layout, check, check_equal, logical_tensors, measure, relative
from tests.distributed.processes import start
from tests.reference_loop import reference_run

SMALLEST = 2**18
"""Elements of 1 MiB: what is less stays in memory."""
TOGETHER = 300_000
# 1.7 million parameters, 6.7 MB. Their sizes are such that a gradient of more than 1 MiB lies in the middle of a group,
# and begins there at no multiple of 512 bytes, with one process and with two.
MODEL = ("model.n_head=4", "model.d_model=372", "model.n_layer=1", "optim.lr=1e-3")
SHARDED = Layout(data=2, zero=3, accumulation=2)
ALONE = Layout(zero=3, accumulation=4)
NONE_GATHERED = "parallel.keep_gathered_below_elements=0"
WEIGHTS = ("parallel.offload_weights=cpu",)
BF16 = ("train.dtype=bf16",)
FP16 = ("train.dtype=fp16", "parallel.extra={fp16: {initial_scale_power: 22, hysteresis: 1}}")
"""The first steps overflow."""


@pytest.fixture(scope="module")
def disk(where):
    folder = where / "nvme"
    folder.mkdir()
    return (NONE_GATHERED, "parallel.offload_optimizer=nvme", f"parallel.nvme_dir={folder}",
            f"parallel.update_elements={TOGETHER}")  # fmt: skip


@pytest.fixture(scope="module")
def configured(tokens):
    return lambda layout, *words: layouts.configuration(layout, tokens, *MODEL, *words)


@pytest.fixture(scope="module")
def reference(configured):
    return reference_run(configured(Layout()), STEPS)


WRITTEN_AT, END = 1, 3


@pytest.fixture(scope="module")
def measured(where, disk, configured):
    """All that the fast tests look at, in one group of two processes."""
    on_disk = configured(SHARDED, *disk)
    elsewhere = configured(Layout(data=2, zero=2, accumulation=2, offload=True))
    written = CheckpointStore(where / "written").step_dir(WRITTEN_AT)
    rewritten = CheckpointStore(where / "rewritten").step_dir(END)
    jobs = [
        Job("fp32", on_disk, STEPS, save_first=where / "written"),
        Job("out", elsewhere, END, load=written, save_loaded=where / "out", save=where / "rewritten"),
        Job("in", on_disk, END + 2, load=rewritten, save_loaded=where / "in"),
    ]
    return measure([(SHARDED, job) for job in jobs], where)


def test_loss_and_gradient_norm_equal_the_plain_loop(measured, reference):
    check(measured["fp32"], reference)
    assert sum(norm > 0.5 for norm in reference.grad_norms) > STEPS / 2
    assert reference.losses[-1] < reference.losses[0] - 0.5


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_one_process_equals_the_plain_loop_and_the_run_in_host_memory(where, disk, configured, reference):
    in_memory = (NONE_GATHERED, "parallel.offload_optimizer=cpu", f"parallel.update_elements={TOGETHER}")
    jobs = [
        (ALONE, Job(f"{name}-{place}", configured(ALONE, *words, *precision), STEPS))
        for place, words in (("disk", disk), ("cpu", in_memory), ("weights", (*disk, *WEIGHTS)))
        for name, precision in (("fp32", ()), ("bf16", BF16), ("fp16", FP16))
    ]
    found = measure(jobs, where)
    for name in ("fp32", "bf16", "fp16"):
        for place in ("cpu", "weights"):
            assert found[f"{name}-disk"].losses == found[f"{name}-{place}"].losses
            assert str(found[f"{name}-disk"].grad_norms) == str(
                found[f"{name}-{place}"].grad_norms
            )  # NaN where skipped
    check(found["fp32-disk"], reference)
    assert 1e-6 < relative(found["bf16-disk"].losses, reference.losses) < 2e-3
    assert any(found["fp16-disk"].skipped)
    assert not all(found["fp16-disk"].skipped)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_tensor_groups_equal_the_plain_loop(where, disk, configured, reference):
    layout = Layout(data=2, tensor=2, zero=3)
    job = Job("tensor", configured(layout, *disk, "parallel.update_elements=262144"), STEPS)
    check(measure([(layout, job)], where)["tensor"], reference)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_bf16_stays_near_fp32(where, disk, configured, reference):
    found = measure([(SHARDED, Job("bf16", configured(SHARDED, *disk, *BF16), STEPS))], where)["bf16"]
    assert 1e-6 < relative(found.losses, reference.losses) < 2e-3


@pytest.mark.parametrize(("written", "held", "step"), [("written", "out", WRITTEN_AT), ("rewritten", "in", END)])
def test_checkpoints_move_onto_disks_and_off_them_bit_for_bit(written, held, step, measured, where):
    before, after = (logical_tensors(where / one, step) for one in (written, held))
    check_equal(after, before)
    assert all(tensor.abs().max() > 0 for tensor in before.values())


def test_a_run_goes_on_from_a_checkpoint(measured, reference):
    for name, first, last in (("out", WRITTEN_AT, END), ("in", END, END + 2)):
        assert relative(measured[name].losses, reference.losses[first:last]) < 1e-5
        assert relative(measured[name].grad_norms, reference.grad_norms[first:last]) < 1e-5
        assert measured[name].engine_state == {"adam_step": last}


def test_the_state_is_on_disk_and_not_in_memory(where, disk, configured):
    out = where / "state.json"
    start(look_at_state, 1, configured(Layout(zero=3), *disk), out, log=where / "state.log").finish()
    found = json.loads(out.read_text())
    large = [numel >= SMALLEST for numel in found["numels"]]
    assert sum(large) >= 2
    for is_large, numel, weight, moments in zip(large, found["numels"], found["weights"], found["moments"],
                                                strict=True):  # fmt: skip
        assert [weight, *moments] == ([0, 0, 0] if is_large else [numel] * 3)
    on_disk = sum(numel for numel in found["numels"] if numel >= SMALLEST)
    assert found["on_disk"] >= 3 * 4 * on_disk
    assert found["links"] == 0  # nothing that a killed process would leave behind


def moved(whose, folder):
    out = folder / "found.json"
    start(move_through, 1, whose, folder, out, log=folder / "log").finish()
    return json.loads(out.read_text())


def test_reads_and_writes_happen_or_raise(tmp_path):
    found = moved("ours", tmp_path)
    assert found["aligned"]
    assert found["misaligned"]
    assert found["done"] == 1
    assert "no room" in found["full"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"parallel.nvme_dir: .*missing: No such file or directory; name a folder"):
        ScratchFile(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"parallel.nvme_dir: .*file: Not a directory"):
        ScratchFile(tmp_path / "file")


def test_a_request_twice_before_the_wait_leaves_the_second(tmp_path):
    scratch = ScratchFile(tmp_path)
    values = [torch.full((3_000_001,), float(value)) for value in range(5)]
    for value in values:
        scratch.async_pwrite(value, "same", 0)
    assert scratch.wait() == 5
    assert torch.equal(scratch.view("same", 3_000_001), values[-1])
    with pytest.raises(ValueError, match="same holds"):
        scratch.async_pwrite(torch.zeros(4_000_000), "same", 0)


def own_op() -> str | None:
    """Why DeepSpeed's own access cannot be run here, if it cannot. Compiling it takes from minutes to an hour."""
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "unset")) / "async_io" / "async_io.so"
    if not built.exists():
        return f"DeepSpeed's async_io is not compiled ({built}); `AsyncIOBuilder().load()` does, with libaio-dev"
    usable = shutil.which("ninja") and Path("/usr/include/libaio.h").exists()
    return None if usable else "libaio-dev or ninja is missing"


@pytest.mark.exhaustive
@pytest.mark.skipif(own_op() is not None, reason=str(own_op()))
class TestWhyNotDeepSpeedsAccess:
    """Where one of these fails, DeepSpeed looks at results: megagpt/engine/disk.py may hand its op through."""

    def test_what_fails_passes_for_done(self, tmp_path):
        found = moved("theirs", tmp_path)
        assert found["aligned"]
        assert not found["misaligned"]
        assert found["full"] is None

    def test_it_trains_on_gradients_that_were_not_read(self, where, disk, configured, reference):
        job = Job("theirs", configured(SHARDED, *disk), STEPS, without="checked disk access")
        found = measure([(SHARDED, job)], where)["theirs"]
        assert relative(found.losses, reference.losses) > 1e-3
