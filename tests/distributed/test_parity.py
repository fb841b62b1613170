"""Every layout trains as one process without DeepSpeed does: tests/reference_loop.py."""

from __future__ import annotations

import pytest
import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import SliceReader
from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.processes import start
from tests.reference_loop import Curve, reference_run
from tests.tiny import MODELS, run_config

STEPS = 20
BATCH = 8
WIDTH = MODELS["gpt2"]["d_model"]
LAYOUTS = [
    (family, world_size, stage, accumulation)
    for family in ("gpt2", "llama")
    for world_size in (1, 2)
    for stage in (0, 1, 2, 3)
    for accumulation in (1, 4)
]
RECOMPUTED = [(1, "selective", "gpt2"), (3, "full", "gpt2"), (3, "selective", "llama"), (1, "full", "llama")]


def layout_name(family, world_size, stage, accumulation):
    return f"{family}-{world_size}p-zero{stage}-acc{accumulation}"


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def configured(where, tokens):
    """A configuration of this module, by its overrides."""

    def make(*overrides, family="gpt2"):
        return run_config(where / "unused", tokens, f"train.max_steps={STEPS}", *overrides, family=family)

    return make


@pytest.fixture(scope="module")
def references(configured) -> dict[str, Curve]:
    return {family: reference_run(configured(family=family), STEPS) for family in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def measured(where, configured) -> dict[str, Measured]:
    """All layouts in two groups, of one process and of two, side by side."""
    groups = {n: start(run_jobs, n, jobs_of(n, where, configured), where / f"{n}.json", log=where / f"{n}.log")
              for n in (1, 2)}  # fmt: skip
    for group in groups.values():
        group.finish()
    return read_measured(where / "1.json") | read_measured(where / "2.json")


def jobs_of(world_size, where, configured):
    jobs = []
    for layout in LAYOUTS:
        family, processes, stage, accumulation = layout
        if processes == world_size:
            micro = BATCH // processes // accumulation
            config = configured(f"parallel.zero_stage={stage}", f"train.micro_batch_size={micro}", family=family)
            name = layout_name(*layout)
            jobs.append(Job(name, config, STEPS, save=where / name if accumulation == 4 else None))
    for stage, recompute, family in RECOMPUTED:
        options = (f"parallel.zero_stage={stage}", f"train.recompute={recompute}")
        jobs.append(Job(f"{recompute}-{family}-{world_size}p", configured(*options, family=family), STEPS))
    for stage in (1, 3):
        options = (f"parallel.zero_stage={stage}", "train.dtype=bf16")
        jobs.append(Job(f"bf16-{world_size}p-zero{stage}", configured(*options), STEPS))
    for name, without in (("ours", None), ("theirs", "spare copies")):
        # By default DeepSpeed rounds the sums to bf16 on their way to the other processes, even where there are none.
        whole = "parallel.extra={communication_data_type: fp32}"
        config = configured("train.dtype=bf16", f"train.micro_batch_size={2 // world_size}", whole)
        save = where / f"copies-{world_size}p-{name}"
        jobs.append(Job(save.name, config, 6, without=without, save=save))
    accumulating = configured("parallel.zero_stage=2", f"train.micro_batch_size={2 // world_size}")
    jobs += [
        Job(f"swapped-{world_size}p-{index}", accumulating, 1, swap_micro_batch=index) for index in (None, 0, 1, 2, 3)
    ]
    return jobs


def relative(found, expected):
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout_name(*layout))
def test_loss_and_gradient_norm_of_every_layout_equal_the_plain_loop(layout, measured, references):
    found, expected = measured[layout_name(*layout)], references[layout[0]]
    assert relative(found.losses, expected.losses) < 1e-5
    assert relative(found.grad_norms, expected.grad_norms) < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_plain_loop_clips_and_learns_so_that_equality_means_something(family, references):
    reference = references[family]
    assert sum(norm > 0.5 for norm in reference.grad_norms) >= STEPS - 5
    assert reference.losses[-1] < reference.losses[0] - 0.5


@pytest.mark.parametrize("layout", [one for one in LAYOUTS if one[3] == 4], ids=lambda layout: layout_name(*layout))
def test_weights_after_twenty_steps_equal_the_plain_loop(layout, measured, references, where):
    step_dir = CheckpointStore(where / layout_name(*layout)).step_dir(STEPS)
    with SliceReader(rank_files(step_dir, read_manifest(step_dir))) as reader:
        for name, expected in references[layout[0]].weights.items():
            found = reader.read_whole(name)
            if name.endswith("attention.qkv.bias"):  # softmax does not see a key bias: its gradient is only rounding
                found, expected = (torch.cat([bias[:WIDTH], bias[2 * WIDTH :]]) for bias in (found, expected))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("stage", "recompute", "family"), RECOMPUTED)
def test_recomputing_activations_changes_nothing(stage, recompute, family, world_size, measured, references):
    found = measured[f"{recompute}-{family}-{world_size}p"]
    assert relative(found.losses, references[family].losses) < 1e-5
    assert relative(found.grad_norms, references[family].grad_norms) < 1e-5


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_bf16_stays_near_fp32(world_size, stage, measured, references):
    assert 1e-5 < relative(measured[f"bf16-{world_size}p-zero{stage}"].losses, references["gpt2"].losses) < 2e-3


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_micro_batch_reaches_the_update(world_size, measured):
    """Replacing any one of them changes the gradient of the first step."""
    whole = measured[f"swapped-{world_size}p-None"]
    for index in range(4):
        swapped = measured[f"swapped-{world_size}p-{index}"]
        assert relative(swapped.grad_norms, whole.grad_norms) > 1e-3


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_deepspeeds_copies_every_bit_is_the_same(world_size, measured, where):
    ours, theirs = (f"copies-{world_size}p-{name}" for name in ("ours", "theirs"))
    assert measured[ours].losses == measured[theirs].losses
    assert measured[ours].grad_norms == measured[theirs].grad_norms
    assert max(measured[ours].grad_norms) > 0.5  # clipped
    step_dirs = [CheckpointStore(where / name).step_dir(6) for name in (ours, theirs)]
    readers = [SliceReader(rank_files(step_dir, read_manifest(step_dir))) for step_dir in step_dirs]
    with readers[0] as one, readers[1] as other:
        for name in one.shapes:
            assert torch.equal(one.read_whole(name), other.read_whole(name)), name


@pytest.mark.parametrize(("stage", "optimizer"), [(1, "BF16_Optimizer"), (3, "DeepSpeedZeroOptimizer_Stage3")])
def test_bf16_runs_under_the_optimizer_that_accumulates_in_fp32(stage, optimizer, measured):
    assert measured[f"bf16-2p-zero{stage}"].optimizer == optimizer
