"""Muon at every layout that is allowed trains as one process with the papers' Muon does: tests/reference_muon.py."""

from __future__ import annotations

from itertools import product

import pytest

from megagpt.checkpoint.store import CheckpointStore
from megagpt.checkpoint.tensors import MOMENTS, MOMENTUM, WEIGHT
from tests.distributed.jobs import Job, Measured
from tests.distributed.layouts import (
    BATCH,
    SHALLOW,
    STEPS,
    Layout,
    References,
    by_name,
    check,
    check_clips_and_learns,
    check_equal,
    initial_weights,
    logical_tensors,
    measure,
    relative,
    swapped_jobs,
    training_jobs,
)

pytestmark = pytest.mark.timeout(900)  # one fixture trains them all

OPTIONS = {  # beside the defaults
    "gpt2": (),
    "llama": ("optim.muon.scale=spectral", "optim.muon.lr=2e-3", "optim.muon.nesterov=false"),
    "mqa": ("optim.muon.ns_steps=4", "optim.muon.momentum=0.9"),
}


def with_muon(family: str, **others) -> Layout:
    return Layout(family=family, more=("optim.name=muon", *OPTIONS[family]), label="muon", **others)


FAST = [
    with_muon("gpt2", data=2, accumulation=4),  # two processes come first: they save what others read
    with_muon("gpt2", zero=0, accumulation=4),
    with_muon("llama", data=2),
    with_muon("gpt2", tensor=2, tensor_sequence=True),
    with_muon("llama", tensor=2, accumulation=4),
    with_muon("mqa", data=2, tensor=2),
    with_muon("llama", sequence=2),
]
LOW_PRECISION = [
    with_muon("gpt2", data=2, accumulation=2, dtype="bf16"),
    with_muon("llama", tensor=2, tensor_sequence=True, dtype="bf16"),
]
ALL = [
    with_muon(family, data=data, tensor=tensor, zero=zero, tensor_sequence=sequence, accumulation=accumulation)
    for (data, tensor), family, zero, sequence, accumulation in product(
        ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)), SHALLOW, (0, 1), (False, True), (1, 4)
    )
    if accumulation * data <= BATCH and (tensor > 1 or not sequence)
]
SLOW = [layout for layout in ALL if layout not in FAST]
SWAPPED = with_muon("gpt2", data=2, accumulation=4)
SWAPPED_MICRO_BATCHES = (0, 3)

CLIPPED = [with_muon("gpt2", data=2, accumulation=4), with_muon("llama", tensor=2, accumulation=4)]
CLIPS = (0, 1e-3)  # of norms above 1

# A checkpoint of the first is read by all, one of another optimizer's step 0 by the last.
SAVED_AT = 3
MOVED = [
    with_muon("llama", data=2),
    with_muon("llama", zero=0),
    with_muon("llama", tensor=2, tensor_sequence=True),
]


@pytest.fixture(scope="module")
def curves(configured) -> References:
    """Of the papers' Muon."""
    return References(lambda layout: configured(with_muon(layout.family)))


@pytest.fixture(scope="module")
def measured(where, configured) -> dict[str, Measured]:
    jobs = [(one, Job(one.name, configured(one), STEPS, save=where / one.name)) for one in FAST + LOW_PRECISION]
    jobs += swapped_jobs(SWAPPED, configured, SWAPPED_MICRO_BATCHES)
    for layout, clip in product(CLIPPED, CLIPS):
        name, config = f"{layout.name}-clip{clip}", configured(layout, f"optim.grad_clip={clip}")
        jobs.append((layout, Job(name, config, 1, save=where / name)))
    return measure(jobs + moved(where, configured), where)


def moved(where, configured):
    """Save at a step, read elsewhere, save at once, and go on; start from weights that no Muon has seen."""
    jobs = [(MOVED[0], Job("moved-from", configured(MOVED[0]), SAVED_AT, save=where / "moved-from"))]
    for layout in MOVED:
        name, load = f"moved-to-{layout.name}", CheckpointStore(where / "moved-from").step_dir(SAVED_AT)
        job = Job(name, configured(layout), STEPS, load=load, save_loaded=where / f"{name}-at-once", save=where / name)
        jobs.append((layout, job))
    adamw = Layout(family="llama", tensor=2, tensor_sequence=True)
    load = CheckpointStore(where / "untrained").step_dir(0)
    jobs.append((adamw, Job("untrained", configured(adamw), 0, save=where / "untrained")))
    jobs.append((MOVED[2], Job("from-untrained", configured(MOVED[2]), STEPS, load=load)))
    return jobs


def kept(folder, step):
    """Everything in a checkpoint: name|kind -> tensor."""
    return logical_tensors(folder, step, kinds=None)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_gradient_norm_and_weights_equal_the_plain_loop(layout, measured, curves, where):
    found, expected = measured[layout.name], curves[layout.family]
    assert found.optimizer == "ShardedMuon"
    check(found, expected)
    tensors = kept(where / layout.name, STEPS)
    for name, weight in expected.weights.items():
        if not name.endswith("attention.qkv.bias"):  # softmax does not see a key bias: its gradient is only rounding
            difference = (tensors[f"{name}|{WEIGHT}"] - weight).norm() / weight.norm()
            assert difference < 1e-5, (name, difference)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_layout_equals_the_plain_loop(where, configured, curves):
    found = measure(training_jobs(SLOW, configured), where)
    for layout in SLOW:
        check(found[layout.name], curves[layout.family])


@pytest.mark.parametrize("family", SHALLOW)
def test_the_plain_loop_clips_and_learns_and_is_not_adamw(family, curves, references):
    check_clips_and_learns(curves[family])
    assert relative(curves[family].losses, references[family].losses) > 1e-3


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_bf16_stays_near_fp32_from_the_first_update_on(layout, measured, curves):
    """The second loss is after one update: DeepSpeed's wrapper at stage 0 would have made another one before it."""
    found, expected = measured[layout.name], curves[layout.family]
    assert found.optimizer == "ShardedMuon"
    assert 1e-5 < relative(found.losses, expected.losses) < 2e-3
    assert relative(found.losses[:2], expected.losses[:2]) < 2e-4


def test_every_micro_batch_reaches_the_update(measured):
    for index in SWAPPED_MICRO_BATCHES:
        assert relative(measured[f"swapped-{index}"].grad_norms, measured["swapped-None"].grad_norms) > 1e-4


def test_a_checkpoint_holds_a_momentum_for_matrices_and_moments_for_the_rest(measured, where, curves):
    for layout in (with_muon("mqa", data=2, tensor=2), with_muon("llama", tensor=2, accumulation=4)):
        tensors = kept(where / layout.name, STEPS)
        for name in curves[layout.family].weights:
            kinds = (MOMENTUM,) if name.startswith("blocks.") and "norm" not in name else MOMENTS
            expected = {f"{name}|{kind}" for kind in (WEIGHT, *kinds)}
            assert {key for key in tensors if key.startswith(f"{name}|")} == expected
            assert all(tensors[f"{name}|{kind}"].abs().max() > 0 for kind in kinds)


@pytest.mark.parametrize("layout", CLIPPED, ids=by_name)
def test_clipping_acts_on_raw_gradients_and_leaves_updates_their_size(layout, measured, where, curves, configured):
    """A thousandth of the gradient makes the same first update of a matrix; clipping the update would not."""
    names = [f"{layout.name}-clip{clip}" for clip in CLIPS]
    whole, clipped = (kept(where / name, 1) for name in names)
    assert measured[names[0]].grad_norms == measured[names[1]].grad_norms  # told as it was
    factor = CLIPS[1] / curves[layout.family].grad_norms[0]
    for name, weight in initial_weights(configured(layout)).items():
        if f"{name}|{MOMENTUM}" in whole:
            updates = [tensors[f"{name}|{WEIGHT}"] - weight for tensors in (whole, clipped)]
            assert updates[0].norm() > 1e-3 * weight.norm()
            assert (updates[1] - updates[0]).norm() < 1e-3 * updates[0].norm(), name
            momenta = [tensors[f"{name}|{MOMENTUM}"] for tensors in (whole, clipped)]
            assert (momenta[1] - factor * momenta[0]).norm() < 1e-3 * momenta[1].norm(), name


@pytest.mark.parametrize("layout", MOVED, ids=by_name)
def test_a_checkpoint_of_one_layout_goes_on_in_another(layout, measured, where, curves):
    written = kept(where / "moved-from", SAVED_AT)
    held = kept(where / f"moved-to-{layout.name}-at-once", SAVED_AT)
    check_equal(held, written)
    after, expected = measured[f"moved-to-{layout.name}"], curves["llama"]
    assert relative(after.losses, expected.losses[SAVED_AT:]) < 1e-5
    assert relative(after.grad_norms, expected.grad_norms[SAVED_AT:]) < 1e-5
    assert after.engine_state == {"adam_step": STEPS}


def test_a_resumed_run_ends_bit_for_bit_as_the_unbroken_one(measured, where):
    assert "moved-from" in measured
    check_equal(kept(where / f"moved-to-{MOVED[0].name}", STEPS), kept(where / MOVED[0].name, STEPS))


def test_weights_that_have_not_trained_need_no_state(measured, curves):
    check(measured["from-untrained"], curves["llama"])
