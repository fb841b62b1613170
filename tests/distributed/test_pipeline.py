"""A pipeline trains as one process does: 1F1B and DualPipeV, tied heads, uneven stages, evaluation, checkpoints."""

from __future__ import annotations

import shutil
from itertools import product

import pytest

from megagpt.checkpoint.store import CheckpointStore
from tests.distributed.jobs import Job, Measured
from tests.distributed.layouts import (
    STEPS,
    Layout,
    by_name,
    check,
    check_equal,
    check_first_gradients,
    check_near,
    check_swapped,
    initial_weights,
    logical_tensors,
    measure,
    relative,
    swapped_jobs,
)
from tests.distributed.moves import Moves
from tests.distributed.processes import start, train_command
from tests.distributed.test_resume import rows
from tests.tiny import run_words

FAST = [
    Layout(family="deep_gpt2", pipeline=2, accumulation=4),
    Layout(family="deep_llama", pipeline=2, accumulation=1, recompute="full"),
    Layout(family="deep_gpt2", pipeline=2, accumulation=4, schedule="dualpipev"),
    Layout(family="deep_mqa", pipeline=2, accumulation=8, schedule="dualpipev", recompute="selective"),
    Layout(family="deep_mqa", pipeline=2, tensor=2, accumulation=4, tensor_sequence=True),
]
LOW_PRECISION = [
    Layout(family="deep_gpt2", pipeline=2, accumulation=4, dtype="fp16"),
    Layout(family="deep_mqa", pipeline=2, accumulation=4, schedule="dualpipev", dtype="bf16"),
]
SLOW = [Layout(family="deep_gpt2", pipeline=2, tensor=2, accumulation=2)]
SLOW_LOW_PRECISION = [Layout(family="deep_gpt2", pipeline=2, accumulation=4, dtype="bf16")]
SPLIT = Layout(family="deep_mqa", pipeline=2, accumulation=2, more=("parallel.pipeline_split=[1,3]",), label="split")
SWAPPED = Layout(family="deep_llama", pipeline=2, accumulation=4)
PLACES = {
    "1p": Layout(family="deep_mqa", zero=2),
    "2p-zero3": Layout(family="deep_mqa", zero=3, data=2),
    "pp2": Layout(family="deep_mqa", pipeline=2, accumulation=4),
    "pp2v": Layout(family="deep_mqa", pipeline=2, accumulation=4, schedule="dualpipev"),
    "pp4": Layout(family="deep_mqa", pipeline=4, accumulation=2),
    "pp2-tp2": Layout(family="deep_mqa", pipeline=2, tensor=2, tensor_sequence=True, accumulation=2),
    "tp2-zero3": Layout(family="deep_mqa", tensor=2, zero=3),
}
MOVES = [("pp2", "pp2v"), ("pp2v", "1p"), ("1p", "pp2-tp2")]
ODD = ("model.d_ff=44",)
"""ZeRO's parts cut through rows."""


@pytest.fixture(scope="module")
def moves(where, configured) -> Moves:
    return Moves(PLACES, MOVES, where, configured, ODD)


def watched_jobs(layouts, where, configured):
    return [(one, Job(one.name, configured(one), STEPS, save_first=where / one.name, validate=11)) for one in layouts]


@pytest.fixture(scope="module")
def measured(where, configured, moves) -> dict[str, Measured]:
    jobs = watched_jobs(FAST + LOW_PRECISION, where, configured)
    jobs.append((FAST[0], Job("untied", configured(FAST[0]), 2, without="tied gradients")))
    jobs.append((SPLIT, Job("split", configured(SPLIT), 8)))
    jobs.append((SWAPPED, Job("initial", configured(SWAPPED), 0, save=where / "initial")))
    return measure(moves.jobs() + jobs + swapped_jobs(SWAPPED, configured, range(4)), where)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_and_gradient_norm_equal_the_plain_loop(layout, measured, references):
    check(measured[layout.name], references[layout.family])


def test_stages_of_another_size_train_the_same(measured, references):
    check(measured["split"], references["deep_mqa"], steps=8)


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_low_precision_stays_near_fp32(layout, measured, references):
    check_near_also_in_norm(measured[layout.name], references[layout.family])


def check_near_also_in_norm(found, expected):
    check_near(found, expected)
    assert relative(found.grad_norms, expected.grad_norms) < 2e-2


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_other_layouts_train_as_one_process_does(tmp_path, configured, references):
    measured = measure(watched_jobs(SLOW + SLOW_LOW_PRECISION, tmp_path, configured), tmp_path)
    for layout in SLOW:
        check(measured[layout.name], references[layout.family])
        beta1 = configured(layout).optim.betas[0]
        check_first_gradients(tmp_path / layout.name, references[layout.family].first_gradients, beta1)
    for layout in SLOW_LOW_PRECISION:
        check_near_also_in_norm(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_every_gradient_of_the_first_step_equals_the_plain_loops(layout, measured, references, where, configured):
    assert layout.name in measured
    beta1 = configured(layout).optim.betas[0]
    check_first_gradients(where / layout.name, references[layout.family].first_gradients, beta1)


def test_every_micro_batch_reaches_the_update(measured):
    check_swapped(measured, range(4))


def test_copies_of_a_tied_head_stay_equal_and_are_told_where_they_do_not(measured):
    assert {measured[one.name].differing for one in FAST + LOW_PRECISION} == {None}
    assert "embedding.tokens.weight of rank 1 and of rank 0" in measured["untied"].differing


def test_initial_weights_are_those_of_one_process_bit_for_bit(measured, where, configured):
    assert "initial" in measured
    found = logical_tensors(where / "initial", 0)
    weights = {name.removesuffix("|weight"): found[name] for name in found if name.endswith("|weight")}
    check_equal(weights, initial_weights(configured(SWAPPED)))


def test_validation_loss_is_the_same_in_every_layout(measured):
    for family in ("deep_gpt2", "deep_mqa"):
        losses = [measured[one.name].validation for one in FAST if one.family == family]
        assert len(losses) >= 2
        assert {targets for _, targets in losses} == {11 * 16}
        assert [loss for loss, _ in losses] == pytest.approx([losses[0][0]] * len(losses), rel=1e-5)


def test_checkpoints_move_into_and_out_of_pipelines_bit_for_bit(moves, measured):
    moves.check(measured)


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_checkpoints_move_between_all_places_bit_for_bit(tmp_path, configured):
    moves = Moves(PLACES, list(product(PLACES, PLACES)), tmp_path, configured, ODD)
    moves.check(moves.measure())


def test_a_run_goes_on_as_a_pipeline_and_back(tmp_path, tokens, val_tokens):
    common = ["train.max_steps=6", "train.micro_batch_size=2", f"data.val={val_tokens}", "eval.every=3"]
    common += ["checkpoint.save_every=2", "optim.lr=1e-3", "model.n_layer=4"]
    unbroken, moved = tmp_path / "unbroken", tmp_path / "moved"
    start(train_command, 1, run_words(unbroken, tokens, *common), log=tmp_path / "log1").finish()
    pipeline = ["parallel.pipeline=2", "parallel.pipeline_schedule=dualpipev"]
    stopped = run_words(moved, tokens, *common, "parallel.pipeline=2")
    start(train_command, 2, stopped, log=tmp_path / "log2").finish()
    for step in (4, 6):
        remove(moved, step)
    start(train_command, 2, run_words(moved, tokens, *common, *pipeline), log=tmp_path / "log3").finish()
    remove(moved, 6)
    start(train_command, 2, run_words(moved, tokens, *common, "parallel.zero_stage=3"), log=tmp_path / "log4").finish()
    for key in ("loss", "grad_norm", "val_loss"):
        found, expected = ([row[key] for row in rows(one) if key in row] for one in (moved, unbroken))
        assert found == pytest.approx(expected, rel=1e-5)


def remove(run_dir, step):
    shutil.rmtree(CheckpointStore(run_dir / "checkpoints").step_dir(step))
