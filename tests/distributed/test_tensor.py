"""Tensor parallelism, alone and with every ZeRO stage, trains as one process without DeepSpeed does."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from megagpt.checkpoint.open import open_checkpoint, rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import KINDS, SliceReader
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.processes import start, train_command
from tests.distributed.tensor_jobs import measure_dropout, measure_loss, save_initial_weights
from tests.reference_loop import Curve, reference_run
from tests.tiny import VOCAB_SIZE, run_config, run_words

STEPS = 20
BATCH = 8

# Heads of an even width, and as many as the largest tensor group has processes.
MODELS = {
    "gpt2": ("gpt2", "model.n_head=4", "model.d_model=32"),
    "llama": ("llama",),  # 4 query heads, 2 key and value heads
    "mqa": ("llama", "model.n_kv_head=1", "model.d_model=32", "model.qk_norm=true", "model.tied_head=true"),
}


@dataclass(frozen=True, order=True)
class Layout:
    world_size: int
    tensor: int
    family: str
    stage: int
    sequence: bool = False
    accumulation: int = 1
    dtype: str = "fp32"
    recompute: str = "none"

    @property
    def name(self) -> str:
        sequence = "-sequence" * self.sequence
        return (
            f"{self.family}-{self.world_size}p-tensor{self.tensor}{sequence}-zero{self.stage}-acc{self.accumulation}"
            + f"-{self.dtype}" * (self.dtype != "fp32")
            + f"-{self.recompute}" * (self.recompute != "none")
        )

    @property
    def group(self) -> tuple[int, int]:
        return self.world_size, self.tensor

    def words(self) -> list[str]:
        return [
            *MODELS[self.family][1:],
            f"train.max_steps={STEPS}",
            f"train.micro_batch_size={max(1, BATCH * self.tensor // self.world_size // self.accumulation)}",
            f"train.dtype={self.dtype}",
            f"train.recompute={self.recompute}",
            f"parallel.tensor={self.tensor}",
            f"parallel.zero_stage={self.stage}",
            f"parallel.tensor_sequence={str(self.sequence).lower()}",
        ]


FAST = [
    Layout(2, 2, "gpt2", 0, sequence=True),
    Layout(2, 2, "gpt2", 1, accumulation=4),
    Layout(2, 2, "gpt2", 3, sequence=True, accumulation=4),
    Layout(2, 2, "llama", 0),
    Layout(2, 2, "llama", 1, sequence=True),
    Layout(2, 2, "llama", 2, accumulation=4),
    Layout(2, 2, "mqa", 2, sequence=True),
    Layout(2, 2, "mqa", 3, recompute="full"),
    Layout(4, 2, "gpt2", 2, recompute="selective"),
    Layout(4, 2, "llama", 3, sequence=True, recompute="full"),
    Layout(4, 4, "mqa", 1, sequence=True),
    Layout(4, 4, "mqa", 3),
]
LOW_PRECISION = [
    Layout(2, 2, "gpt2", 1, sequence=True, dtype="bf16"),
    Layout(2, 2, "llama", 3, dtype="bf16"),
    Layout(2, 2, "llama", 2, sequence=True, dtype="fp16"),
]
ALL = [
    Layout(*group, family, stage, sequence, accumulation)
    for group, family, stage, sequence, accumulation in product(
        ((2, 2), (4, 2), (4, 4)), MODELS, (0, 1, 2, 3), (False, True), (1, 4)
    )
    if accumulation * group[0] // group[1] <= BATCH
]
EIGHT = [Layout(8, 2, "gpt2", 3, sequence=True), Layout(8, 4, "mqa", 2)]
SLOW = [layout for layout in ALL + EIGHT if layout not in FAST]

# A first step tensor by tensor, and one in which each micro-batch is replaced in turn.
FIRST_STEPS = [
    Layout(2, 2, "gpt2", 0, sequence=True),
    Layout(2, 2, "llama", 1, sequence=True),
    Layout(2, 2, "mqa", 3),
    Layout(4, 4, "mqa", 2, sequence=True),
]
SWAPPED = Layout(2, 2, "llama", 2, accumulation=4)


def by_name(layout):
    return layout.name


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("tensor")


@pytest.fixture(scope="module")
def configured(where, tokens):
    return lambda layout: run_config(where / "unused", tokens, *layout.words(), family=MODELS[layout.family][0])


@pytest.fixture(scope="module")
def references(configured) -> dict[str, Curve]:
    return {family: reference_run(configured(Layout(1, 1, family, 1)), STEPS) for family in MODELS}


def measure(jobs, where):
    """Run (layout, job) pairs, a group of processes for each number of them and tensor degree, one after the other."""
    groups = defaultdict(list)
    for layout, job in jobs:
        groups[layout.group].append(job)
    found = {}
    for (world_size, tensor), members in groups.items():
        name = f"{world_size}-{tensor}"
        start(run_jobs, world_size, members, where / f"{name}.json", log=where / f"{name}.log").finish(3000)
        found |= read_measured(where / f"{name}.json")
    return found


@pytest.fixture(scope="module")
def measured(where, configured) -> dict[str, Measured]:
    jobs = [(layout, Job(layout.name, configured(layout), STEPS)) for layout in FAST + LOW_PRECISION]
    jobs += [
        (layout, Job(f"first-{layout.name}", configured(layout), 1, save=where / f"first-{layout.name}"))
        for layout in FIRST_STEPS
    ]
    swapped = configured(SWAPPED)
    jobs += [(SWAPPED, Job(f"swapped-{index}", swapped, 1, swap_micro_batch=index)) for index in (None, 0, 1, 2, 3)]
    return measure(jobs, where)


def relative(found, expected):
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def check(found, expected, tolerance=1e-5):
    assert relative(found.losses, expected.losses) < tolerance
    assert relative(found.grad_norms, expected.grad_norms) < tolerance


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_and_gradient_norm_equal_the_plain_loop(layout, measured, references):
    check(measured[layout.name], references[layout.family])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_loss_and_gradient_norm_of_every_layout_equal_the_plain_loop(configured, references, tmp_path):
    measured = measure([(layout, Job(layout.name, configured(layout), STEPS)) for layout in SLOW], tmp_path)
    for layout in SLOW:
        check(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("family", MODELS)
def test_the_plain_loop_clips_and_learns_so_that_equality_means_something(family, references):
    reference = references[family]
    assert sum(norm > 0.5 for norm in reference.grad_norms) >= STEPS - 5
    assert reference.losses[-1] < reference.losses[0] - 0.5


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_low_precision_stays_near_fp32(layout, measured, references):
    assert 1e-5 < relative(measured[layout.name].losses, references[layout.family].losses) < 2e-3


def logical_tensors(folder, step):
    step_dir = CheckpointStore(folder).step_dir(step)
    with SliceReader(rank_files(step_dir, read_manifest(step_dir))) as reader:
        return {f"{name}|{kind}": reader.read_whole(name, kind) for name in reader.shapes for kind in KINDS}


@pytest.mark.parametrize("layout", FIRST_STEPS, ids=by_name)
def test_every_gradient_of_the_first_step_equals_the_plain_loops(layout, measured, references, where, configured):
    """Adam's first moment after one step is (1 - beta1) of the clipped gradient."""
    assert f"first-{layout.name}" in measured
    tensors = logical_tensors(where / f"first-{layout.name}", 1)
    keep = configured(layout).optim.betas[0]
    expected = references[layout.family].first_gradients
    assert {name.partition("|")[0] for name in tensors} == expected.keys()
    for name, gradient in expected.items():
        found = tensors[f"{name}|exp_avg"] / (1 - keep)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9, msg=name)


def test_every_micro_batch_reaches_the_update(measured):
    """Replacing any one of them changes the first step by a hundred times the tolerance above."""
    whole = measured["swapped-None"]
    for index in range(4):
        swapped = measured[f"swapped-{index}"]
        assert relative(swapped.losses + swapped.grad_norms, whole.losses + whole.grad_norms) > 1e-3


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
    layouts = [Layout(tensor, tensor, family, 1, sequence) for family in MODELS for sequence in (False, True)]
    configs = [configured(layout) for layout in layouts]
    start(save_initial_weights, tensor, configs, tmp_path, log=tmp_path / "log").finish()
    for index, config in enumerate(configs):
        saved = [torch.load(tmp_path / f"{index}-{tensor}-{rank}.pt") for rank in range(tensor)]
        whole = build_model(config.model)
        init_weights(whole, config.run.seed)
        expected = dict(whole.named_parameters())
        assert all(parameters.keys() == expected.keys() for parameters, _ in saved)
        for name, parameter in expected.items():
            parts = [parameters[name] for parameters, _ in saved]
            assert torch.equal(joined(name, parts, config), parameter), name
            counted_on_all = all(name in tagged for _, tagged in saved)
            assert counted_on_all == (parts[0].shape != parameter.shape), name


@pytest.mark.parametrize("tensor", [2, 4])
def test_the_loss_of_a_cut_vocabulary_is_that_of_the_whole(tensor, configured, tmp_path):
    out = tmp_path / "loss.json"
    start(measure_loss, tensor, configured(Layout(tensor, tensor, "gpt2", 1)), out, log=tmp_path / "log").finish()
    for found in (row for rows in json.loads(out.read_text()) for row in rows):
        assert found["nll"][0] == pytest.approx(found["nll"][1], rel=1e-6)
        assert found["padding_gradient"] == 0
        bf16 = found["dtypes"][1] == "torch.bfloat16"
        assert found["gradient_error"] <= (1e-2 if bf16 else 1e-5) * found["gradient_size"]
        assert found["dtypes"][0] == "torch.float32"


@pytest.mark.parametrize("sequence", [False, True])
def test_dropout_agrees_outside_of_the_regions_and_differs_inside(sequence, where, tokens, tmp_path):
    words = Layout(2, 2, "gpt2", 1, sequence).words()
    config = run_config(where / "unused", tokens, *words, "model.dropout=0.4")
    out = tmp_path / "dropout.json"
    start(measure_dropout, 2, config, out, log=tmp_path / "log").finish()
    first, second = json.loads(out.read_text())
    agree = {name for name in first if first[name] == second[name]}
    assert {"after", "end", "norm_gradient", "recomputed"} <= agree
    assert "attention" not in agree
    assert ("residual" in agree) == (not sequence)
    assert "residual_mask" not in agree
    assert first["recomputed"] == [1.0, 1.0]


WRITTEN_AT, END = 3, 5
PLACES = {
    "1p": Layout(1, 1, "mqa", 2),
    "2p": Layout(2, 1, "mqa", 3, accumulation=2),
    "tensor2-zero1": Layout(2, 2, "mqa", 1),
    "tensor2-zero0": Layout(2, 2, "mqa", 0, sequence=True),
    "4p-tensor2-zero3": Layout(4, 2, "mqa", 3),
    "tensor4-zero2": Layout(4, 4, "mqa", 2, sequence=True),
}
MOVES = [
    ("tensor2-zero1", "1p"),
    ("1p", "tensor4-zero2"),
    ("tensor2-zero1", "4p-tensor2-zero3"),
]


def move_all(moves, where, tokens):
    """Write a checkpoint in each place, then read each in the other, keep what was read, and go on."""

    def config(place):
        # Odd sizes: ZeRO's parts cut through rows, and the last ones are padded.
        words = [*PLACES[place].words(), "model.d_ff=44", "model.n_layer=1"]
        return run_config(where / "unused", tokens, *words, family="llama")

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


def test_checkpoints_move_between_tensor_degrees_bit_for_bit(tmp_path, tokens):
    move_all(MOVES, tmp_path, tokens)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_checkpoints_move_between_all_places_bit_for_bit(tmp_path, tokens):
    move_all(list(product(PLACES, PLACES)), tmp_path, tokens)


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
        found, expected = (
            [row[key] for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if key in row]
            for run_dir in (moved, unbroken)
        )
        assert found == pytest.approx(expected, rel=1e-5)
    weights = [
        dict(open_checkpoint(CheckpointStore(run_dir / "checkpoints").step_dir(3)).load_model().named_parameters())
        for run_dir in (moved, unbroken)
    ]
    for name, parameter in weights[1].items():
        torch.testing.assert_close(weights[0][name], parameter, rtol=1e-4, atol=1e-5, msg=name)
