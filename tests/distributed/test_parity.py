"""Every layout trains as one process without DeepSpeed does: tests/reference_loop.py."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from tests.distributed.jobs import Job, Measured
from tests.distributed.layouts import (
    SHALLOW,
    STEPS,
    Layout,
    by_name,
    check,
    check_clips_and_learns,
    check_equal,
    check_near,
    logical_tensors,
    measure,
    relative,
    training_jobs,
)

ALL = [
    Layout(family=family, data=data, zero=zero, accumulation=accumulation)
    for family, data, zero, accumulation in product(("gpt2", "llama"), (1, 2), (0, 1, 2, 3), (1, 4))
]
# Every stage on one process and on two; families and numbers of micro-batches take turns.
FAST = [
    Layout(
        family=("gpt2", "llama")[(data + zero) % 2], data=data, zero=zero, accumulation=(1, 4)[(data + zero // 2) % 2]
    )
    for data, zero in product((1, 2), (0, 1, 2, 3))
]
SLOW = [layout for layout in ALL if layout not in FAST]
RECOMPUTED, SLOW_RECOMPUTED = (
    [
        Layout(family=family, data=data, zero=zero, accumulation=4 // data, recompute=recompute)
        for family, zero, recompute in (
            ("gpt2", 1, "selective"),
            ("gpt2", 3, "full"),
            ("llama", 3, "selective"),
            ("llama", 1, "full"),
        )
    ]
    for data in (2, 1)
)
BF16, SLOW_BF16 = (
    [Layout(data=data, zero=zero, accumulation=4 // data, dtype="bf16") for zero in (1, 3)] for data in (2, 1)
)
# By default DeepSpeed rounds the sums to bf16 on their way to the other processes, even where there are none.
WHOLE = ("parallel.extra={communication_data_type: fp32}",)
COPIES = [Layout(data=data, accumulation=4, dtype="bf16", more=WHOLE, label="whole") for data in (1, 2)]
# A model in which each micro-batch shows in the norm.
NARROW = ("model.n_head=2", "model.d_model=24")
SWAPPED = [Layout(data=data, zero=2, accumulation=4, more=NARROW, label="narrow") for data in (1, 2)]


def saving_jobs(layouts, configured, where):
    """Those that accumulate keep their last weights."""
    return [
        (one, Job(one.name, configured(one), STEPS, save=where / one.name if one.accumulation == 4 else None))
        for one in layouts
    ]


@pytest.fixture(scope="module")
def measured(where, configured) -> dict[str, Measured]:
    jobs = saving_jobs(FAST, configured, where) + training_jobs(RECOMPUTED + BF16, configured)
    for one, guard in product(COPIES, (None, "spare copies")):
        name = f"copies-{one.data}p-{guard}"
        jobs.append((one, Job(name, configured(one), 6, without=guard, save=where / name)))
    for one, index in product(SWAPPED, (None, 0, 1, 2, 3)):
        jobs.append((one, Job(f"swapped-{one.data}p-{index}", configured(one), 1, swap_micro_batch=index)))
    return measure(jobs, where)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_and_gradient_norm_equal_the_plain_loop(layout, measured, references):
    check(measured[layout.name], references[layout.family])


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_every_layout_equals_the_plain_loop(configured, references, tmp_path):
    jobs = saving_jobs(SLOW, configured, tmp_path) + training_jobs(SLOW_RECOMPUTED + SLOW_BF16, configured)
    measured = measure(jobs, tmp_path)
    for layout in SLOW + SLOW_RECOMPUTED:
        check(measured[layout.name], references[layout.family])
        if layout.accumulation == 4 and layout in SLOW:
            check_weights(tmp_path / layout.name, references[layout.family].weights, configured(layout))
    for layout in SLOW_BF16:
        check_near(measured[layout.name], references["gpt2"])


@pytest.mark.parametrize("family", SHALLOW)
def test_the_plain_loop_clips_and_learns_so_that_equality_means_something(family, references):
    check_clips_and_learns(references[family])


@pytest.mark.parametrize("layout", [one for one in FAST if one.accumulation == 4], ids=by_name)
def test_weights_after_twenty_steps_equal_the_plain_loop(layout, measured, references, where, configured):
    assert layout.name in measured
    check_weights(where / layout.name, references[layout.family].weights, configured(layout))


def check_weights(folder, expected, config):
    width = config.model.d_model
    tensors = logical_tensors(folder, STEPS)
    for name, weight in expected.items():
        found = tensors[f"{name}|weight"]
        if name.endswith("attention.qkv.bias"):  # softmax does not see a key bias: its gradient is only rounding
            found, weight = (torch.cat([bias[:width], bias[2 * width :]]) for bias in (found, weight))
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("layout", RECOMPUTED, ids=by_name)
def test_recomputing_activations_changes_nothing(layout, measured, references):
    check(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("layout", BF16, ids=by_name)
def test_bf16_stays_near_fp32(layout, measured, references):
    check_near(measured[layout.name], references["gpt2"])


@pytest.mark.parametrize("data", [1, 2])
def test_every_micro_batch_reaches_the_update(data, measured):
    """Replacing any one of them changes the gradient of the first step."""
    whole = measured[f"swapped-{data}p-None"]
    for index in range(4):
        swapped = measured[f"swapped-{data}p-{index}"]
        assert relative(swapped.grad_norms, whole.grad_norms) > 1e-3


@pytest.mark.parametrize("data", [1, 2])
def test_without_deepspeeds_copies_every_bit_is_the_same(data, measured, where):
    ours, theirs = (f"copies-{data}p-{guard}" for guard in (None, "spare copies"))
    assert measured[ours].losses == measured[theirs].losses
    assert measured[ours].grad_norms == measured[theirs].grad_norms
    assert max(measured[ours].grad_norms) > 0.5  # clipped
    check_equal(logical_tensors(where / ours, 6), logical_tensors(where / theirs, 6))


def test_bf16_runs_under_the_optimizer_that_accumulates_in_fp32(measured):
    optimizers = [measured[layout.name].optimizer for layout in BF16]
    assert optimizers == ["BF16_Optimizer", "DeepSpeedZeroOptimizer_Stage3"]
