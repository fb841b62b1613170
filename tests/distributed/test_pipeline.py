"""A pipeline trains as one process does: 1F1B and DualPipeV, tied heads, uneven stages, evaluation, checkpoints."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from megagpt.checkpoint.store import CheckpointStore
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from tests.distributed.jobs import Job, Measured
from tests.distributed.layouts import (
    STEPS,
    Layout,
    by_name,
    check,
    check_first_gradients,
    logical_tensors,
    measure,
    relative,
)
from tests.distributed.processes import start, train_command
from tests.reference_loop import reference_run
from tests.tiny import run_config, run_words

FAST = [
    Layout(pipeline=2, accumulation=4),
    Layout(pipeline=2, accumulation=1, family="llama", recompute="full"),
    Layout(pipeline=2, accumulation=4, schedule="dualpipev"),
    Layout(pipeline=2, accumulation=8, family="mqa", schedule="dualpipev", recompute="selective"),
    Layout(pipeline=2, tensor=2, accumulation=4, family="mqa", tensor_sequence=True),
    Layout(pipeline=2, tensor=2, accumulation=2, family="gpt2"),
]
LOW_PRECISION = [
    Layout(pipeline=2, accumulation=4, dtype="bf16"),
    Layout(pipeline=2, accumulation=4, dtype="fp16"),
    Layout(pipeline=2, accumulation=4, family="mqa", schedule="dualpipev", dtype="bf16"),
]
SPLIT = Layout(pipeline=2, accumulation=2, family="mqa")
SWAPPED = Layout(pipeline=2, accumulation=4, family="llama")


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def configured(where, tokens, val_tokens):
    def make(layout, *words):
        family = "gpt2" if layout.family == "gpt2" else "llama"
        return run_config(where / "unused", tokens, *layout.words(), f"data.val={val_tokens}", *words, family=family)

    return make


@pytest.fixture(scope="module")
def references(configured):
    return {family: reference_run(configured(Layout(family=family)), STEPS) for family in ("gpt2", "llama", "mqa")}


@pytest.fixture(scope="module")
def measured(where, configured) -> dict[str, Measured]:
    jobs = [
        (one, Job(one.name, configured(one), STEPS, save_first=where / one.name, validate=11))
        for one in FAST + LOW_PRECISION
    ]
    tied = FAST[0]
    jobs.append((tied, Job("untied", configured(tied), 2, without="tied gradients")))
    jobs.append((SPLIT, Job("split", configured(SPLIT, "parallel.pipeline_split=[1,3]"), STEPS)))
    swapped = configured(SWAPPED)
    jobs += [(SWAPPED, Job(f"swapped-{index}", swapped, 1, swap_micro_batch=index)) for index in (None, 0, 1, 2, 3)]
    jobs.append((SWAPPED, Job("initial", swapped, 0, save=where / "initial")))
    return measure(jobs, where)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_and_gradient_norm_equal_the_plain_loop(layout, measured, references):
    check(measured[layout.name], references[layout.family])


def test_stages_of_another_size_train_the_same(measured, references):
    check(measured["split"], references["mqa"])


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_low_precision_stays_near_fp32(layout, measured, references):
    found = measured[layout.name]
    assert 1e-5 < relative(found.losses, references[layout.family].losses) < 2e-3
    assert relative(found.grad_norms, references[layout.family].grad_norms) < 2e-2


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_every_gradient_of_the_first_step_equals_the_plain_loops(layout, measured, references, where, configured):
    assert layout.name in measured
    beta1 = configured(layout).optim.betas[0]
    check_first_gradients(where / layout.name, references[layout.family].first_gradients, beta1)


def test_every_micro_batch_reaches_the_update(measured):
    whole = measured["swapped-None"]
    for index in range(4):
        swapped = measured[f"swapped-{index}"]
        assert relative(swapped.losses + swapped.grad_norms, whole.losses + whole.grad_norms) > 1e-3


def test_copies_of_a_tied_head_stay_equal_and_are_told_where_they_do_not(measured):
    assert {measured[one.name].differing for one in FAST + LOW_PRECISION} == {None}
    assert "embedding.tokens.weight of rank 1 and of rank 0" in measured["untied"].differing


def test_initial_weights_are_those_of_one_process_bit_for_bit(measured, where, configured):
    assert "initial" in measured
    whole = build_model(configured(SWAPPED).model)
    init_weights(whole, configured(SWAPPED).run.seed)
    found = logical_tensors(where / "initial", 0)
    for name, parameter in whole.named_parameters():
        assert torch.equal(found[f"{name}|weight"], parameter), name


def test_validation_loss_is_the_same_in_every_layout(measured):
    for family in ("gpt2", "mqa"):
        losses = [measured[one.name].validation for one in FAST if one.family == family]
        assert len(losses) >= 2
        assert {targets for _, targets in losses} == {11 * 16}
        assert [loss for loss, _ in losses] == pytest.approx([losses[0][0]] * len(losses), rel=1e-5)


WRITTEN_AT, END = 3, 5
PLACES = {
    "1p": Layout(family="mqa", zero=2),
    "2p-zero3": Layout(family="mqa", zero=3, data=2),
    "pp2": Layout(family="mqa", pipeline=2, accumulation=4),
    "pp2v": Layout(family="mqa", pipeline=2, accumulation=4, schedule="dualpipev"),
    "pp4": Layout(family="mqa", pipeline=4, accumulation=2),
    "pp2-tp2": Layout(family="mqa", pipeline=2, tensor=2, tensor_sequence=True, accumulation=2),
    "tp2-zero3": Layout(family="mqa", tensor=2, zero=3),
}
MOVES = [("pp2", "2p-zero3"), ("2p-zero3", "pp2-tp2"), ("pp2v", "1p"), ("pp2", "pp2v")]


def move_all(moves, where, configured):
    """Write a checkpoint in each place, then read each in the other, keep what was read, and go on."""

    def config(place):
        return configured(PLACES[place], "model.d_ff=44")  # ZeRO's parts cut through rows

    writers = {writer for writer, _ in moves}
    measure([(PLACES[one], Job(one, config(one), WRITTEN_AT, save=where / one)) for one in sorted(writers)], where)
    jobs = []
    for writer, reader in moves:
        load = CheckpointStore(where / writer).step_dir(WRITTEN_AT)
        name = f"{writer}-to-{reader}"
        jobs.append((PLACES[reader], Job(name, config(reader), END, load=load, save_loaded=where / name)))
    measured = measure(jobs, where)
    reference = reference_run(config("1p"), END)
    for writer, reader in moves:
        name = f"{writer}-to-{reader}"
        written, held = logical_tensors(where / writer, WRITTEN_AT), logical_tensors(where / name, WRITTEN_AT)
        assert written.keys() == held.keys()
        for key, tensor in written.items():
            assert torch.equal(tensor, held[key]), (name, key)
            assert key.endswith("|weight") or tensor.abs().max() > 0, (name, key)
        assert measured[name].losses == pytest.approx(reference.losses[WRITTEN_AT:END], rel=1e-5)
        assert measured[name].grad_norms == pytest.approx(reference.grad_norms[WRITTEN_AT:END], rel=1e-5)


def test_checkpoints_move_into_and_out_of_pipelines_bit_for_bit(tmp_path, configured):
    move_all(MOVES, tmp_path, configured)


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_checkpoints_move_between_all_places_bit_for_bit(tmp_path, configured):
    move_all(list(product(PLACES, PLACES)), tmp_path, configured)


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
        found, expected = (
            [row[key] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if key in row]
            for run_dir in (moved, unbroken)
        )
        assert found == pytest.approx(expected, rel=1e-5)


def remove(run_dir, step):
    import shutil

    shutil.rmtree(CheckpointStore(run_dir / "checkpoints").step_dir(step))
