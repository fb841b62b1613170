"""Ulysses sequence parallelism, alone and with every other kind, trains as one process without DeepSpeed does."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch

from megagpt.checkpoint.store import CheckpointStore
from megagpt.data.indexed import TokenFile
from megagpt.data.mixture import sequential_windows
from megagpt.model.build import build_model
from megagpt.model.decoder import HEAD
from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.processes import start, train_command
from tests.distributed.sequence_jobs import MISTAKES, measure_dropout, measure_heads, measure_mistakes
from tests.distributed.test_resume import rows
from tests.distributed.test_tensor import BATCH, STEPS, by_name, check, logical_tensors, relative
from tests.distributed.test_tensor import MODELS as SHALLOW
from tests.reference_loop import Curve, reference_run
from tests.tiny import run_config, run_words

MODELS = SHALLOW | {"deep": (*SHALLOW["gpt2"], "model.n_layer=4")}  # a V of two processes has four stages


@dataclass(frozen=True, order=True)
class Layout:
    world_size: int
    sequence: int
    family: str
    stage: int = 1
    tensor: int = 1
    pipeline: int = 1
    tensor_sequence: bool = False
    accumulation: int = 1
    dtype: str = "fp32"
    recompute: str = "none"
    schedule: str = "1f1b"

    @property
    def name(self) -> str:
        return (
            f"{self.family}-{self.world_size}p-sequence{self.sequence}"
            + f"-tensor{self.tensor}" * (self.tensor > 1)
            + "-tensor_sequence" * self.tensor_sequence
            + f"-{self.schedule}{self.pipeline}" * (self.pipeline > 1)
            + f"-zero{self.stage}-acc{self.accumulation}"
            + f"-{self.dtype}" * (self.dtype != "fp32")
            + f"-{self.recompute}" * (self.recompute != "none")
        )

    @property
    def group(self) -> tuple[int, ...]:
        return self.world_size, self.pipeline, self.sequence, self.tensor

    def words(self) -> list[str]:
        data_parallel = self.world_size // (self.pipeline * self.sequence * self.tensor)
        return [
            *MODELS[self.family][1:],
            f"train.max_steps={STEPS}",
            f"train.micro_batch_size={BATCH // data_parallel // self.accumulation}",
            f"train.dtype={self.dtype}",
            f"train.recompute={self.recompute}",
            f"parallel.sequence={self.sequence}",
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.pipeline_schedule={self.schedule}",
            f"parallel.zero_stage={self.stage}",
            f"parallel.tensor_sequence={str(self.tensor_sequence).lower()}",
        ]


FAST = [
    Layout(2, 2, "gpt2", 2, recompute="selective"),
    Layout(2, 2, "mqa", 3, accumulation=2),
    Layout(4, 2, "llama", 1, tensor=2, tensor_sequence=True),
]
LOW_PRECISION = [Layout(2, 2, "gpt2", 1, dtype="bf16")]
SLOW_LOW_PRECISION = [
    Layout(2, 2, "llama", 2, dtype="fp16"),
    Layout(2, 2, "mqa", 3, dtype="bf16"),
    Layout(4, 4, "llama", 1, dtype="bf16"),
    Layout(4, 2, "llama", 3, tensor=2, tensor_sequence=True, dtype="bf16"),
    Layout(4, 2, "gpt2", pipeline=2, accumulation=4, dtype="bf16"),
]
WITHOUT_PIPELINE = [
    Layout(world_size, sequence, family, stage, tensor, 1, tensor_sequence, accumulation)
    for (world_size, sequence, tensor), family, stage, tensor_sequence, accumulation in product(
        ((2, 2, 1), (4, 2, 1), (4, 4, 1), (4, 2, 2)), SHALLOW, (0, 1, 2, 3), (False, True), (1, 4)
    )
    if tensor > 1 or not tensor_sequence
]
WITH_RECOMPUTATION = [
    Layout(2, 2, family, stage, recompute=recompute)
    for family, stage, recompute in product(SHALLOW, (1, 3), ("selective", "full"))
]
PIPELINES = [
    Layout(4, 2, family, pipeline=2, accumulation=4, recompute=recompute)
    for family, recompute in product(SHALLOW, ("none", "selective", "full"))
]
PIPELINES += [Layout(4, 2, "deep", pipeline=2, accumulation=4, schedule="dualpipev")]
EIGHT = [
    Layout(8, 2, "gpt2", pipeline=2, tensor=2, tensor_sequence=True, accumulation=4),
    Layout(8, 2, "mqa", pipeline=2, tensor=2, accumulation=4, recompute="selective"),
    Layout(8, 2, "llama", pipeline=2, accumulation=2),
    Layout(8, 2, "llama", 3, tensor=2, tensor_sequence=True, accumulation=2),
]
VALIDATED = 7  # with micro-batches of several sequences, the last one has rows that only fill it up
SLOW = [layout for layout in WITHOUT_PIPELINE + WITH_RECOMPUTATION + PIPELINES + EIGHT if layout not in FAST]

FIRST_STEPS = [Layout(2, 2, "gpt2", 0), Layout(4, 2, "mqa", 3, tensor=2, tensor_sequence=True)]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(scope="module")
def configured(where, tokens, val_tokens):
    def configure(layout, *words):
        words = [*layout.words(), f"data.val={val_tokens}", *words]
        return run_config(where / "unused", tokens, *words, family=MODELS[layout.family][0])

    return configure


@pytest.fixture(scope="module")
def references(configured) -> dict[str, Curve]:
    return {family: reference_run(configured(Layout(1, 1, family)), STEPS) for family in MODELS}


def measure(jobs, where):
    """Run (layout, job) pairs, a group of processes for each shape of the mesh, one after the other."""
    groups = defaultdict(list)
    for layout, job in jobs:
        groups[layout.group].append(job)
    found = {}
    for shape, members in groups.items():
        name = "-".join(map(str, shape))
        start(run_jobs, shape[0], members, where / f"{name}.json", log=where / f"{name}.log").finish(3000)
        found |= read_measured(where / f"{name}.json")
    return found


WRITTEN_AT, END = 3, 5
PLACES = {
    "1p": Layout(1, 1, "mqa", 2),
    "sequence2-zero1": Layout(2, 2, "mqa", 1),
    "sequence2-zero3": Layout(2, 2, "mqa", 3),
    "tensor2-sequence2": Layout(4, 2, "mqa", 3, tensor=2, tensor_sequence=True),
    "pipeline2-sequence2": Layout(4, 2, "mqa", 1, pipeline=2, accumulation=2),
}
MOVES = [("sequence2-zero1", "1p"), ("sequence2-zero1", "tensor2-sequence2")]


def moving_jobs(moves, where, configured):
    """Write a checkpoint in each place, then read each in the other, keep what was read, and go on."""
    configs = {place: configured(layout, "model.d_ff=44") for place, layout in PLACES.items()}  # ZeRO's parts cut rows
    jobs = [
        (PLACES[writer], Job(writer, configs[writer], WRITTEN_AT, save=where / writer))
        for writer in sorted({writer for writer, _ in moves})
    ]
    for writer, reader in moves:
        load = CheckpointStore(where / writer).step_dir(WRITTEN_AT)
        name = f"{writer}-to-{reader}"
        jobs.append((PLACES[reader], Job(name, configs[reader], END, load=load, save_loaded=where / name)))
    return jobs


def check_moves(moves, measured, where, configured):
    reference = reference_run(configured(PLACES["1p"], "model.d_ff=44"), END)
    for writer, reader in moves:
        name = f"{writer}-to-{reader}"
        written, held = logical_tensors(where / writer, WRITTEN_AT), logical_tensors(where / name, WRITTEN_AT)
        assert written.keys() == held.keys()
        for key, tensor in written.items():
            assert torch.equal(tensor, held[key]), (name, key)
            assert key.endswith("|weight") or tensor.abs().max() > 0, (name, key)
        assert measured[name].losses == pytest.approx(reference.losses[WRITTEN_AT:END], rel=1e-5)
        assert measured[name].grad_norms == pytest.approx(reference.grad_norms[WRITTEN_AT:END], rel=1e-5)


@pytest.fixture(scope="module")
def measured(where, configured) -> dict[str, Measured]:
    jobs = [(layout, Job(layout.name, configured(layout), STEPS, validate=VALIDATED)) for layout in FAST]
    jobs += [(layout, Job(layout.name, configured(layout), STEPS)) for layout in LOW_PRECISION]
    return measure(jobs + moving_jobs(MOVES, where, configured), where)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_and_gradient_norm_equal_the_plain_loop(layout, measured, references):
    check(measured[layout.name], references[layout.family])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_loss_and_gradient_norm_of_every_layout_equal_the_plain_loop(configured, references, tmp_path):
    measured = measure([(layout, Job(layout.name, configured(layout), STEPS)) for layout in SLOW], tmp_path)
    for layout in SLOW:
        check(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_low_precision_stays_near_fp32(layout, measured, references):
    assert 1e-5 < relative(measured[layout.name].losses, references[layout.family].losses) < 2e-3


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_low_precision_of_other_layouts_stays_near_fp32(configured, references, tmp_path):
    jobs = [(layout, Job(layout.name, configured(layout), STEPS)) for layout in SLOW_LOW_PRECISION]
    measured = measure(jobs, tmp_path)
    for layout in SLOW_LOW_PRECISION:
        assert 1e-5 < relative(measured[layout.name].losses, references[layout.family].losses) < 2e-3, layout


@pytest.mark.exhaustive
def test_every_gradient_of_the_first_step_equals_the_plain_loops(references, configured, tmp_path):
    """Adam's first moment after one step is (1 - beta1) of the clipped gradient."""
    measure(
        [(layout, Job(layout.name, configured(layout), 1, save=tmp_path / layout.name)) for layout in FIRST_STEPS],
        tmp_path,
    )
    for layout in FIRST_STEPS:
        tensors = logical_tensors(tmp_path / layout.name, 1)
        keep = configured(layout).optim.betas[0]
        for name, gradient in references[layout.family].first_gradients.items():
            found = tensors[f"{name}|exp_avg"] / (1 - keep)
            near = {"rtol": 1e-4, "atol": 1e-5 * gradient.abs().max().item() + 1e-9}
            torch.testing.assert_close(found, gradient, **near, msg=f"{layout.name} {name}")


def trade_heads(sequence, heads, configured, tmp_path):
    """Output and gradients of queries, keys and values."""
    out = tmp_path / "heads.json"
    config = configured(Layout(sequence, sequence, "gpt2"))
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
    configs = {family: configured(Layout(2, 2, family)) for family in SHALLOW}
    start(measure_mistakes, 2, configs, out, log=tmp_path / "log").finish()
    for found in json.loads(out.read_text()):
        for family in SHALLOW:
            assert max(found[f"{family}-none"]) < 1e-5
            for mistake in MISTAKES.keys() - {"none", "copies"}:
                assert found[f"{family}-{mistake}"][1] > 1e-3, (family, mistake)
        assert found["mqa-copies"][0] < 1e-6
        assert found["mqa-copies"][1] > 1e-2
        assert found["llama-copies"] == found["llama-none"]  # as many key and value heads as processes


def test_dropout_differs_between_the_processes_of_a_sequence_group(where, tokens, tmp_path):
    config = run_config(where / "unused", tokens, *Layout(2, 2, "gpt2").words(), "model.dropout=0.4")
    out = tmp_path / "dropout.json"
    start(measure_dropout, 2, config, out, log=tmp_path / "log").finish()
    first, second = json.loads(out.read_text())
    assert first["in_step"]["first_heads"] == first["in_step"]["other_heads"]  # what equal numbers would look like
    assert first["in_step"]["residual"] == second["in_step"]["residual"]
    assert first["own"]["first_heads"] != first["own"]["other_heads"]
    assert first["own"]["residual"] != second["own"]["residual"]
    assert first["recomputed"] == second["recomputed"] == [1.0, 1.0]


def test_checkpoints_move_to_and_from_a_sequence_group_bit_for_bit(measured, where, configured):
    check_moves(MOVES, measured, where, configured)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_checkpoints_move_between_all_places_bit_for_bit(configured, tmp_path):
    moves = list(product(PLACES, PLACES))
    jobs = moving_jobs(moves, tmp_path, configured)
    measure(jobs[: len(PLACES)], tmp_path)  # all are written before any is read
    measured = measure(jobs[len(PLACES) :], tmp_path)
    check_moves(moves, measured, tmp_path, configured)


def trains_alike(words, world_size, folder, tokens, val_tokens):
    """A whole run with evaluation beside the same run in one process."""
    common = ["train.max_steps=4", "train.micro_batch_size=2", f"data.val={val_tokens}", "eval.every=2"]
    common += ["eval.sequences=5", *MODELS["llama"][1:]]  # the last batch has a row that only fills it up
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
