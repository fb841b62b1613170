"""Tensor parallelism, alone and with every ZeRO stage, trains as one process without DeepSpeed does."""

from __future__ import annotations

import json
import shutil
from itertools import product

import pytest
import torch

from megagpt.checkpoint.open import open_checkpoint
from megagpt.checkpoint.store import CheckpointStore
from tests.distributed.jobs import Measured
from tests.distributed.layouts import (
    BATCH,
    SHALLOW,
    Layout,
    by_name,
    check,
    check_clips_and_learns,
    check_first_gradients,
    check_near,
    check_swapped,
    initial_weights,
    measure,
    swapped_jobs,
    training_jobs,
)
from tests.distributed.moves import Moves
from tests.distributed.processes import start, train_command
from tests.distributed.tensor_jobs import measure_dropout, measure_loss, save_initial_weights
from tests.distributed.test_resume import rows
from tests.tiny import VOCAB_SIZE, run_words

FAST = [
    Layout(tensor=2, zero=0, tensor_sequence=True),
    Layout(tensor=2, zero=1, accumulation=4),
    Layout(tensor=2, zero=2, family="llama", accumulation=4),
    Layout(tensor=2, zero=3, family="mqa", recompute="full"),
    Layout(data=2, tensor=2, zero=3, family="llama", tensor_sequence=True, recompute="selective"),
    Layout(tensor=4, zero=1, family="mqa", tensor_sequence=True),
]
LOW_PRECISION = [
    Layout(tensor=2, zero=3, family="llama", dtype="bf16"),
    Layout(tensor=2, zero=2, family="llama", tensor_sequence=True, dtype="fp16"),
]
SLOW_LOW_PRECISION = [Layout(tensor=2, zero=1, tensor_sequence=True, dtype="bf16")]
ALL = [
    Layout(data=data, tensor=tensor, family=family, zero=zero, tensor_sequence=sequence, accumulation=accumulation)
    for (data, tensor), family, zero, sequence, accumulation in product(
        ((1, 2), (2, 2), (1, 4)), SHALLOW, (0, 1, 2, 3), (False, True), (1, 4)
    )
    if accumulation * data <= BATCH
]
RECOMPUTED = [
    Layout(data=2, tensor=2, zero=2, recompute="selective"),
    Layout(data=2, tensor=2, zero=3, family="llama", tensor_sequence=True, recompute="full"),
]
EIGHT = [Layout(data=4, tensor=2, zero=3, tensor_sequence=True), Layout(data=2, tensor=4, zero=2, family="mqa")]
SLOW = [layout for layout in ALL + RECOMPUTED + EIGHT if layout not in FAST]
SWAPPED = Layout(tensor=2, zero=2, family="llama", accumulation=4)


PLACES = {
    "1p": Layout(family="mqa", zero=2),
    "2p": Layout(family="mqa", data=2, zero=3, accumulation=2),
    "tensor2-zero1": Layout(family="mqa", tensor=2, zero=1),
    "tensor2-zero0": Layout(family="mqa", tensor=2, zero=0, tensor_sequence=True),
    "4p-tensor2-zero3": Layout(family="mqa", data=2, tensor=2, zero=3),
    "tensor4-zero2": Layout(family="mqa", tensor=4, zero=2, tensor_sequence=True),
}
MOVES = [
    ("tensor2-zero1", "1p"),
    ("1p", "tensor4-zero2"),
    ("tensor2-zero1", "4p-tensor2-zero3"),
]
ODD = ("model.d_ff=44", "model.n_layer=1")
"""ZeRO's parts cut through rows, and the last ones are padded."""


@pytest.fixture(scope="module")
def moves(where, configured) -> Moves:
    return Moves(PLACES, MOVES, where, configured, ODD)


@pytest.fixture(scope="module")
def measured(where, configured, moves) -> dict[str, Measured]:
    jobs = moves.jobs() + training_jobs(FAST, configured, where) + training_jobs(LOW_PRECISION, configured)
    return measure(jobs + swapped_jobs(SWAPPED, configured, range(4)), where)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_and_gradient_norm_equal_the_plain_loop(layout, measured, references):
    check(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_every_gradient_of_the_first_step_equals_the_plain_loops(layout, measured, references, where, configured):
    assert layout.name in measured
    beta1 = configured(layout).optim.betas[0]
    check_first_gradients(where / layout.name, references[layout.family].first_gradients, beta1)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_layout_equals_the_plain_loop(configured, references, tmp_path):
    jobs = training_jobs(SLOW, configured, tmp_path) + training_jobs(SLOW_LOW_PRECISION, configured)
    measured = measure(jobs, tmp_path)
    for layout in SLOW:
        check(measured[layout.name], references[layout.family])
        beta1 = configured(layout).optim.betas[0]
        check_first_gradients(tmp_path / layout.name, references[layout.family].first_gradients, beta1)
    for layout in SLOW_LOW_PRECISION:
        check_near(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("family", SHALLOW)
def test_the_plain_loop_clips_and_learns_so_that_equality_means_something(family, references):
    check_clips_and_learns(references[family])


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_low_precision_stays_near_fp32(layout, measured, references):
    check_near(measured[layout.name], references[layout.family])


def test_every_micro_batch_reaches_the_update(measured):
    check_swapped(measured, range(4))


def joined(name, parts, config):
    """The logical tensor from the parts of a tensor group, by rules of this test's own."""
    model = config.model
    if name in ("embedding.tokens.weight", "head.weight"):
        padded = torch.cat(parts)
        assert len(padded) > VOCAB_SIZE
        assert padded[VOCAB_SIZE:].abs().sum() == 0
        return padded[:VOCAB_SIZE]
    if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
        return torch.cat(parts, dim=1)
    if name.split(".")[-2] in ("qkv", "gate_up", "up"):
        kv_heads = getattr(model, "n_kv_head", model.n_head)
        ratios = {"qkv": (model.n_head, kv_heads, kv_heads), "gate_up": (1, 1), "up": (1,)}[name.split(".")[-2]]
        unit = len(parts[0]) / sum(ratios)
        pieces = [part.split([round(unit * ratio) for ratio in ratios]) for part in parts]
        return torch.cat([torch.cat(piece) for piece in zip(*pieces, strict=True)])
    assert all(torch.equal(parts[0], part) for part in parts)
    return parts[0]


@pytest.mark.parametrize("tensor", [2, 4])
def test_initial_weights_are_those_of_one_process_bit_for_bit(tensor, configured, tmp_path):
    layouts = [Layout(tensor=tensor, family=one, tensor_sequence=sp) for one in SHALLOW for sp in (False, True)]
    configs = [configured(layout) for layout in layouts]
    start(save_initial_weights, tensor, configs, tmp_path, log=tmp_path / "log").finish()
    for index, config in enumerate(configs):
        saved = [torch.load(tmp_path / f"{index}-{tensor}-{rank}.pt") for rank in range(tensor)]
        expected = initial_weights(config)
        assert all(parameters.keys() == expected.keys() for parameters, _ in saved)
        for name, parameter in expected.items():
            parts = [parameters[name] for parameters, _ in saved]
            assert torch.equal(joined(name, parts, config), parameter), name
            counted_on_all = all(name in tagged for _, tagged in saved)
            assert counted_on_all == (parts[0].shape != parameter.shape), name


@pytest.mark.parametrize("tensor", [2, 4])
def test_the_loss_of_a_cut_vocabulary_is_that_of_the_whole(tensor, configured, tmp_path):
    out = tmp_path / "loss.json"
    start(measure_loss, tensor, configured(Layout(tensor=tensor)), out, log=tmp_path / "log").finish()
    for found in (row for process in json.loads(out.read_text()) for row in process):
        assert found["nll"][0] == pytest.approx(found["nll"][1], rel=1e-6)
        assert found["padding_gradient"] == 0
        bf16 = found["dtypes"][1] == "torch.bfloat16"
        assert found["gradient_error"] <= (1e-2 if bf16 else 1e-5) * found["gradient_size"]
        assert found["dtypes"][0] == "torch.float32"


@pytest.mark.parametrize("sequence", [False, True])
def test_dropout_agrees_outside_of_the_regions_and_differs_inside(sequence, configured, tmp_path):
    config = configured(Layout(tensor=2, tensor_sequence=sequence), "model.dropout=0.4")
    out = tmp_path / "dropout.json"
    start(measure_dropout, 2, config, out, log=tmp_path / "log").finish()
    first, second = json.loads(out.read_text())
    agree = {name for name in first if first[name] == second[name]}
    assert {"after", "end", "norm_gradient", "recomputed"} <= agree
    assert "attention" not in agree
    assert ("residual" in agree) == (not sequence)
    assert "residual_mask" not in agree
    assert first["recomputed"] == [1.0, 1.0]


def test_checkpoints_move_between_tensor_degrees_bit_for_bit(moves, measured):
    moves.check(measured)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_checkpoints_move_between_all_places_bit_for_bit(tmp_path, configured):
    moves = Moves(PLACES, list(product(PLACES, PLACES)), tmp_path, configured, ODD)
    moves.check(moves.measure())


def test_a_run_goes_on_under_another_tensor_degree_and_opens_in_one_process(tmp_path, tokens, val_tokens):
    common = ["train.max_steps=6", "train.micro_batch_size=4", f"data.val={val_tokens}", "eval.every=3"]
    common += ["checkpoint.save_every=3", "optim.lr=1e-3"]
    unbroken, moved = tmp_path / "unbroken", tmp_path / "moved"
    start(train_command, 1, run_words(unbroken, tokens, *common), log=tmp_path / "log1").finish()
    cut = run_words(moved, tokens, *common, "parallel.tensor=2", "parallel.tensor_sequence=true")
    start(train_command, 2, cut, log=tmp_path / "log2").finish()
    shutil.rmtree(CheckpointStore(moved / "checkpoints").step_dir(6))
    start(train_command, 2, run_words(moved, tokens, *common), log=tmp_path / "log3").finish()
    events = [json.loads(line) for line in (moved / "events.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resumed"]
    assert resumed["step"] == 3
    assert resumed["changed"]["parallel.tensor"] == [2, 1]
    for key in ("loss", "grad_norm", "val_loss"):
        found, expected = ([row[key] for row in rows(one) if key in row] for one in (moved, unbroken))
        assert found == pytest.approx(expected, rel=1e-5)
    weights = [
        dict(open_checkpoint(CheckpointStore(run_dir / "checkpoints").step_dir(3)).load_model().named_parameters())
        for run_dir in (moved, unbroken)
    ]
    for name, parameter in weights[1].items():
        torch.testing.assert_close(weights[0][name], parameter, rtol=1e-4, atol=1e-5, msg=name)
