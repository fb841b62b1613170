"""Ulysses sequence parallelism, alone and with every other kind, trains as one process without DeepSpeed does."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from megagpt.data.indexed import TokenFile
from megagpt.data.mixture import sequential_windows
from megagpt.model.build import build_model
from megagpt.model.decoder import HEAD
from tests.distributed.jobs import Measured
from tests.distributed.layouts import (
    SHALLOW,
    Layout,
    by_name,
    check,
    check_first_gradients,
    check_near,
    measure,
    training_jobs,
)
from tests.distributed.moves import Moves
from tests.distributed.processes import start, train_command
from tests.distributed.sequence_jobs import MISTAKES, measure_dropout, measure_heads, measure_mistakes
from tests.distributed.test_resume import rows
from tests.tiny import run_words

FAST = [
    Layout(sequence=2, zero=2, recompute="selective"),
    Layout(sequence=2, zero=3, family="mqa", accumulation=2),
    Layout(sequence=2, tensor=2, tensor_sequence=True, family="llama"),
]
LOW_PRECISION = [Layout(sequence=2, dtype="bf16")]
SLOW_LOW_PRECISION = [
    Layout(sequence=2, zero=2, family="llama", dtype="fp16"),
    Layout(sequence=2, zero=3, family="mqa", dtype="bf16"),
    Layout(sequence=4, family="llama", dtype="bf16"),
    Layout(sequence=2, tensor=2, tensor_sequence=True, zero=3, family="llama", dtype="bf16"),
    Layout(sequence=2, pipeline=2, accumulation=4, dtype="bf16"),
]
WITHOUT_PIPELINE = [
    Layout(
        data=data, sequence=sequence, tensor=tensor, family=family, zero=zero,
        tensor_sequence=tensor_sequence, accumulation=accumulation,
    )
    for (data, sequence, tensor), family, zero, tensor_sequence, accumulation in product(
        ((1, 2, 1), (2, 2, 1), (1, 4, 1), (1, 2, 2)), SHALLOW, (0, 1, 2, 3), (False, True), (1, 4)
    )
    if tensor > 1 or not tensor_sequence
]  # fmt: skip
WITH_RECOMPUTATION = [
    Layout(sequence=2, family=family, zero=zero, recompute=recompute)
    for family, zero, recompute in product(SHALLOW, (1, 3), ("selective", "full"))
]
PIPELINES = [
    Layout(pipeline=2, sequence=2, family=family, accumulation=4, recompute=recompute)
    for family, recompute in product(SHALLOW, ("none", "selective", "full"))
]
# A V of two processes has four stages.
PIPELINES += [Layout(pipeline=2, sequence=2, family="deep_gpt2", accumulation=4, schedule="dualpipev")]
EIGHT = [
    Layout(pipeline=2, sequence=2, tensor=2, tensor_sequence=True, accumulation=4),
    Layout(pipeline=2, sequence=2, tensor=2, family="mqa", accumulation=4, recompute="selective"),
    Layout(pipeline=2, data=2, sequence=2, family="llama", accumulation=2),
    Layout(data=2, sequence=2, tensor=2, tensor_sequence=True, zero=3, family="llama", accumulation=2),
]
VALIDATED = 7  # with micro-batches of several sequences, the last one has rows that only fill it up
SLOW = [layout for layout in WITHOUT_PIPELINE + WITH_RECOMPUTATION + PIPELINES + EIGHT if layout not in FAST]

FIRST_STEPS = [
    Layout(sequence=2, zero=0),
    Layout(sequence=2, tensor=2, tensor_sequence=True, zero=3, family="mqa"),
]
PLACES = {
    "1p": Layout(family="mqa", zero=2),
    "sequence2-zero1": Layout(family="mqa", sequence=2, zero=1),
    "sequence2-zero3": Layout(family="mqa", sequence=2, zero=3),
    "tensor2-sequence2": Layout(family="mqa", sequence=2, tensor=2, tensor_sequence=True, zero=3),
    "pipeline2-sequence2": Layout(family="mqa", pipeline=2, sequence=2, accumulation=2),
}
MOVES = [("sequence2-zero1", "1p"), ("sequence2-zero1", "tensor2-sequence2")]
ODD = ("model.d_ff=44",)
"""ZeRO's parts cut through rows."""


@pytest.fixture(scope="module")
def moves(where, configured) -> Moves:
    return Moves(PLACES, MOVES, where, configured, ODD)


@pytest.fixture(scope="module")
def measured(where, configured, moves) -> dict[str, Measured]:
    jobs = [(layout, replace(job, validate=VALIDATED)) for layout, job in training_jobs(FAST, configured)]
    return measure(jobs + training_jobs(LOW_PRECISION, configured) + moves.jobs(), where)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_and_gradient_norm_equal_the_plain_loop(layout, measured, references):
    check(measured[layout.name], references[layout.family])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_loss_and_gradient_norm_of_every_layout_equal_the_plain_loop(configured, references, tmp_path):
    measured = measure(training_jobs(SLOW, configured), tmp_path)
    for layout in SLOW:
        check(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_low_precision_stays_near_fp32(layout, measured, references):
    check_near(measured[layout.name], references[layout.family])


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_low_precision_of_other_layouts_stays_near_fp32(configured, references, tmp_path):
    measured = measure(training_jobs(SLOW_LOW_PRECISION, configured), tmp_path)
    for layout in SLOW_LOW_PRECISION:
        check_near(measured[layout.name], references[layout.family])


@pytest.mark.exhaustive
def test_every_gradient_of_the_first_step_equals_the_plain_loops(references, configured, tmp_path):
    measure([(one, replace(job, steps=1)) for one, job in training_jobs(FIRST_STEPS, configured, tmp_path)], tmp_path)
    for layout in FIRST_STEPS:
        beta1 = configured(layout).optim.betas[0]
        check_first_gradients(tmp_path / layout.name, references[layout.family].first_gradients, beta1)


def trade_heads(sequence, heads, configured, tmp_path):
    """Output and gradients of queries, keys and values."""
    out = tmp_path / "heads.json"
    config = configured(Layout(sequence=sequence))
    start(measure_heads, sequence, config, heads, out, log=tmp_path / "log").finish()
    errors = json.loads(out.read_text())
    assert (len(errors), len(errors[0]), len(errors[0][0])) == (sequence, len(heads), 4)
    assert max(error for process in errors for case in process for error in case) < 2e-6


def test_attention_over_traded_heads_is_attention_over_the_whole_sequence(configured, tmp_path):
    """In the last two cases there are fewer key and value heads than processes."""
    trade_heads(4, [(4, 4), (8, 4), (8, 2), (4, 1)], configured, tmp_path)


@pytest.mark.exhaustive
def test_attention_over_heads_traded_by_two(configured, tmp_path):
    trade_heads(2, [(4, 4), (4, 2), (6, 2), (4, 1)], configured, tmp_path)


def test_the_comparison_with_one_process_sees_mistakes(configured, tmp_path):
    """Positions that begin at 0 everywhere, a head's copies without their gradients, no exchange at all."""
    out = tmp_path / "mistakes.json"
    configs = {family: configured(Layout(sequence=2, family=family)) for family in SHALLOW}
    start(measure_mistakes, 2, configs, out, log=tmp_path / "log").finish()
    for found in json.loads(out.read_text()):
        for family in SHALLOW:
            assert max(found[f"{family}-none"]) < 1e-5
            for mistake in MISTAKES.keys() - {"none", "copies"}:
                assert found[f"{family}-{mistake}"][1] > 1e-3, (family, mistake)
        assert found["mqa-copies"][0] < 1e-6
        assert found["mqa-copies"][1] > 1e-2
        assert found["llama-copies"] == found["llama-none"]  # as many key and value heads as processes


def test_dropout_differs_between_the_processes_of_a_sequence_group(configured, tmp_path):
    config = configured(Layout(sequence=2), "model.dropout=0.4")
    out = tmp_path / "dropout.json"
    start(measure_dropout, 2, config, out, log=tmp_path / "log").finish()
    first, second = json.loads(out.read_text())
    assert first["in_step"]["first_heads"] == first["in_step"]["other_heads"]  # what equal numbers would look like
    assert first["in_step"]["residual"] == second["in_step"]["residual"]
    assert first["own"]["first_heads"] != first["own"]["other_heads"]
    assert first["own"]["residual"] != second["own"]["residual"]
    assert first["recomputed"] == second["recomputed"] == [1.0, 1.0]


def test_checkpoints_move_to_and_from_a_sequence_group_bit_for_bit(moves, measured):
    moves.check(measured)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_checkpoints_move_between_all_places_bit_for_bit(configured, tmp_path):
    moves = Moves(PLACES, list(product(PLACES, PLACES)), tmp_path, configured, ODD)
    moves.check(moves.measure())


def trains_alike(words, world_size, folder, tokens, val_tokens):
    """A whole run with evaluation beside the same run in one process."""
    common = ["train.max_steps=4", "train.micro_batch_size=2", f"data.val={val_tokens}", "eval.every=2"]
    common += ["eval.sequences=5"]  # the last batch has a row that only fills it up
    alone, shared = folder / "alone", folder / "shared"
    start(train_command, 1, run_words(alone, tokens, *common, family="llama"), log=folder / "log1").finish()
    start(
        train_command, world_size, run_words(shared, tokens, *common, *words, family="llama"), log=folder / "log2"
    ).finish()
    for key in ("loss", "grad_norm", "tokens", "val_loss", "val_tokens"):
        found, expected = ([row[key] for row in rows(run) if key in row] for run in (shared, alone))
        assert len(expected) == (3 if key.startswith("val") else 4)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_evaluation_gives_the_loss_of_one_process(layout, measured, references, configured):
    config = configured(layout)
    model = build_model(config.model)
    model.load_state_dict({HEAD: model.head.weight} | references[layout.family].weights)
    loss, n_targets = measured[layout.name].validation
    windows = sequential_windows(TokenFile.open(config.data.val), config.model.max_seq_len, VALIDATED)
    tokens = torch.from_numpy(np.stack([windows.sample(index) for index in range(VALIDATED)]))
    expected = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert n_targets == VALIDATED * config.model.max_seq_len
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        (["parallel.sequence=2"], 2),
        (["parallel.sequence=2", "parallel.pipeline=2"], 4),
        (["parallel.sequence=2", "parallel.zero_stage=3"], 4),
        (["parallel.sequence=2", "parallel.tensor=2", "parallel.tensor_sequence=true"], 4),
    ],
)
def test_a_run_and_its_evaluations_equal_those_of_one_process(words, world_size, tmp_path, tokens, val_tokens):
    trains_alike(words, world_size, tmp_path, tokens, val_tokens)
