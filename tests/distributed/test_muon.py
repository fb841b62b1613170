"""Muon at every layout that is allowed trains as one process with the papers' Muon does: tests/reference_muon.py."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import MOMENTS, MOMENTUM, WEIGHT, SliceReader
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.processes import start
from tests.reference_loop import Curve, reference_run
from tests.tiny import run_config

pytestmark = pytest.mark.timeout(900)  # one fixture trains them all

STEPS = 20
BATCH = 8
MODELS = {
    "gpt2": ("gpt2", "model.n_head=4", "model.d_model=32"),
    "llama": ("llama",),  # 4 query heads, 2 key and value heads
    "mqa": ("llama", "model.n_kv_head=1", "model.d_model=32", "model.qk_norm=true", "model.tied_head=true"),
}
OPTIONS = {  # beside the defaults
    "gpt2": (),
    "llama": ("optim.muon.scale=spectral", "optim.muon.lr=2e-3", "optim.muon.nesterov=false"),
    "mqa": ("optim.muon.ns_steps=4", "optim.muon.momentum=0.9"),
}


UNSET = [f"optim.muon.{key}" for key in ("lr=null", "scale=rms", "momentum=0.95", "nesterov=true", "ns_steps=5")]


@dataclass(frozen=True, order=True)
class Layout:
    world_size: int
    tensor: int
    family: str
    stage: int
    sequence: bool = False
    accumulation: int = 1
    dtype: str = "fp32"
    ulysses: int = 1

    @property
    def name(self) -> str:
        return (
            f"{self.family}-{self.world_size}p-tensor{self.tensor}{'-sequence' * self.sequence}-zero{self.stage}"
            + f"-ulysses{self.ulysses}" * (self.ulysses > 1)
            + f"-acc{self.accumulation}-{self.dtype}"
        )

    @property
    def group(self) -> tuple[int, int, int]:
        return self.world_size, self.tensor, self.ulysses

    def words(self) -> list[str]:
        model_parallel = self.tensor * self.ulysses
        return [
            *MODELS[self.family][1:],
            *OPTIONS[self.family],
            "optim.name=muon",
            f"train.max_steps={STEPS}",
            f"train.micro_batch_size={max(1, BATCH * model_parallel // self.world_size // self.accumulation)}",
            f"train.dtype={self.dtype}",
            f"parallel.tensor={self.tensor}",
            f"parallel.sequence={self.ulysses}",
            f"parallel.zero_stage={self.stage}",
            f"parallel.tensor_sequence={str(self.sequence).lower()}",
        ]


FAST = [
    Layout(2, 1, "gpt2", 1, accumulation=4),  # two processes come first: they save what others read
    Layout(1, 1, "gpt2", 0, accumulation=4),
    Layout(2, 1, "llama", 1),
    Layout(2, 1, "mqa", 1),
    Layout(2, 2, "gpt2", 1, sequence=True),
    Layout(2, 2, "llama", 1, accumulation=4),
    Layout(4, 2, "gpt2", 1),
    Layout(2, 1, "llama", 1, ulysses=2),
]
LOW_PRECISION = [
    Layout(2, 1, "gpt2", 1, accumulation=2, dtype="bf16"),
    Layout(2, 2, "llama", 1, sequence=True, dtype="bf16"),
]
ALL = [
    Layout(*group, family, stage, sequence, accumulation)
    for group, family, stage, sequence, accumulation in product(
        ((1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4)), MODELS, (0, 1), (False, True), (1, 4)
    )
    if accumulation * group[0] // group[1] <= BATCH and (group[1] > 1 or not sequence)
]
SLOW = [layout for layout in ALL if layout not in FAST]
SWAPPED = Layout(2, 1, "gpt2", 1, accumulation=4)
SWAPPED_MICRO_BATCHES = (0, 3)


CLIPPED = [Layout(2, 1, "gpt2", 1, accumulation=4), Layout(2, 2, "llama", 1, accumulation=4)]
CLIPS = (0, 1e-3)  # of norms above 1

# A checkpoint of the first is read by all, one of another optimizer's step 0 by the last.
SAVED_AT = 3
MOVED = [Layout(2, 1, "llama", 1), Layout(1, 1, "llama", 0), Layout(2, 2, "llama", 1, sequence=True)]


def by_name(layout):
    return layout.name


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("muon")


@pytest.fixture(scope="module")
def configured(where, tokens):
    def make(layout, *overrides):
        return run_config(where / "unused", tokens, *layout.words(), *overrides, family=MODELS[layout.family][0])

    return make


@pytest.fixture(scope="module")
def references(configured) -> dict[str, Curve]:
    return {family: reference_run(configured(Layout(1, 1, family, 1)), STEPS) for family in MODELS}


def measure(jobs, where):
    """Run (layout, job) pairs, a group of processes for each number of them and tensor degree, one after the other."""
    groups = defaultdict(list)
    for layout, job in jobs:
        groups[layout.group].append(job)
    found = {}
    for (world_size, *degrees), members in groups.items():
        name = f"{world_size}-{degrees}-{members[0].name}"
        start(run_jobs, world_size, members, where / f"{name}.json", log=where / f"{name}.log").finish(3000)
        found |= read_measured(where / f"{name}.json")
    return found


@pytest.fixture(scope="module")
def measured(where, configured) -> dict[str, Measured]:
    jobs = [(one, Job(one.name, configured(one), STEPS, save=where / one.name)) for one in FAST + LOW_PRECISION]
    for index in (None, *SWAPPED_MICRO_BATCHES):
        jobs.append((SWAPPED, Job(f"swapped-{index}", configured(SWAPPED), 1, swap_micro_batch=index)))
    for layout, clip in product(CLIPPED, CLIPS):
        name, config = f"{layout.name}-clip{clip}", configured(layout, f"optim.grad_clip={clip}")
        jobs.append((layout, Job(name, config, 1, save=where / name)))
    jobs += moved(where, configured)
    return measure(jobs, where)


def moved(where, configured):
    """Save at a step, read elsewhere, save at once, and go on; start from weights that no Muon has seen."""
    jobs = [(MOVED[0], Job("moved-from", configured(MOVED[0]), SAVED_AT, save=where / "moved-from"))]
    for layout in MOVED:
        name, load = f"moved-to-{layout.name}", CheckpointStore(where / "moved-from").step_dir(SAVED_AT)
        job = Job(name, configured(layout), STEPS, load=load, save_loaded=where / f"{name}-at-once", save=where / name)
        jobs.append((layout, job))
    adamw = configured(MOVED[2], "optim.name=adamw", *UNSET)
    load = CheckpointStore(where / "untrained").step_dir(0)
    jobs.append((MOVED[2], Job("untrained", adamw, 0, save=where / "untrained")))
    jobs.append((MOVED[2], Job("from-untrained", configured(MOVED[2]), STEPS, load=load)))
    return jobs


def relative(found, expected):
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def logical_tensors(store_folder, step):
    """Everything in a checkpoint: name|kind -> tensor."""
    step_dir = CheckpointStore(store_folder).step_dir(step)
    with SliceReader(rank_files(step_dir, read_manifest(step_dir))) as reader:
        kept = [(name, kind) for name in reader.shapes for kind in reader.kinds(name)]
        return {f"{name}|{kind}": reader.read_whole(name, kind) for name, kind in kept}


def assert_equal_curves(found, expected):
    assert relative(found.losses, expected.losses) < 1e-5
    assert relative(found.grad_norms, expected.grad_norms) < 1e-5


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_loss_gradient_norm_and_weights_equal_the_plain_loop(layout, measured, references, where):
    found, expected = measured[layout.name], references[layout.family]
    assert found.optimizer == "ShardedMuon"
    assert_equal_curves(found, expected)
    tensors = logical_tensors(where / layout.name, STEPS)
    for name, weight in expected.weights.items():
        if not name.endswith("attention.qkv.bias"):  # softmax does not see a key bias: its gradient is only rounding
            difference = (tensors[f"{name}|{WEIGHT}"] - weight).norm() / weight.norm()
            assert difference < 1e-5, (name, difference)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_every_layout_equals_the_plain_loop(where, configured, references):
    found = measure([(one, Job(one.name, configured(one), STEPS)) for one in SLOW], where)
    for layout in SLOW:
        assert_equal_curves(found[layout.name], references[layout.family])


def test_the_plain_loop_clips_and_learns_and_is_not_adamw(references, configured):
    for family, reference in references.items():
        assert sum(norm > 0.5 for norm in reference.grad_norms) >= STEPS - 5
        assert reference.losses[-1] < reference.losses[0] - 0.5
        adamw = reference_run(configured(Layout(1, 1, family, 1), "optim.name=adamw", *UNSET), STEPS)
        assert relative(reference.losses, adamw.losses) > 1e-3


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_bf16_stays_near_fp32_from_the_first_update_on(layout, measured, references):
    """The second loss is after one update: DeepSpeed's wrapper at stage 0 would have made another one before it."""
    found, expected = measured[layout.name], references[layout.family]
    assert found.optimizer == "ShardedMuon"
    assert 1e-5 < relative(found.losses, expected.losses) < 2e-3
    assert relative(found.losses[:2], expected.losses[:2]) < 2e-4


def test_every_micro_batch_reaches_the_update(measured):
    for index in SWAPPED_MICRO_BATCHES:
        assert relative(measured[f"swapped-{index}"].grad_norms, measured["swapped-None"].grad_norms) > 1e-4


def test_a_checkpoint_holds_a_momentum_for_matrices_and_moments_for_the_rest(measured, where, references):
    for layout in (Layout(2, 1, "mqa", 1), Layout(2, 2, "llama", 1, accumulation=4)):
        tensors = logical_tensors(where / layout.name, STEPS)
        for name in references[layout.family].weights:
            kinds = (MOMENTUM,) if name.startswith("blocks.") and "norm" not in name else MOMENTS
            expected = {f"{name}|{kind}" for kind in (WEIGHT, *kinds)}
            assert {key for key in tensors if key.startswith(f"{name}|")} == expected
            assert all(tensors[f"{name}|{kind}"].abs().max() > 0 for kind in kinds)


@pytest.mark.parametrize("layout", CLIPPED, ids=by_name)
def test_clipping_acts_on_raw_gradients_and_leaves_updates_their_size(layout, measured, where, references):
    """A thousandth of the gradient makes the same first update of a matrix; clipping the update would not."""
    names = [f"{layout.name}-clip{clip}" for clip in CLIPS]
    whole, clipped = (logical_tensors(where / name, 1) for name in names)
    assert measured[names[0]].grad_norms == measured[names[1]].grad_norms  # told as it was
    first = references[layout.family]
    factor = CLIPS[1] / first.grad_norms[0]
    before = initial_weights(layout.family)
    for name, weight in before.items():
        if f"{name}|{MOMENTUM}" in whole:
            updates = [tensors[f"{name}|{WEIGHT}"] - weight for tensors in (whole, clipped)]
            assert updates[0].norm() > 1e-3 * weight.norm()
            assert (updates[1] - updates[0]).norm() < 1e-3 * updates[0].norm(), name
            momenta = [tensors[f"{name}|{MOMENTUM}"] for tensors in (whole, clipped)]
            assert (momenta[1] - factor * momenta[0]).norm() < 1e-3 * momenta[1].norm(), name


def initial_weights(family):
    config = run_config(Path("unused"), Path("unused"), *MODELS[family][1:], family=MODELS[family][0])
    model = build_model(config.model)
    init_weights(model, config.run.seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", MOVED, ids=by_name)
def test_a_checkpoint_of_one_layout_goes_on_in_another(layout, measured, where, references):
    written = logical_tensors(where / "moved-from", SAVED_AT)
    held = logical_tensors(where / f"moved-to-{layout.name}-at-once", SAVED_AT)
    assert written.keys() == held.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in written.items())
    after, expected = measured[f"moved-to-{layout.name}"], references["llama"]
    assert relative(after.losses, expected.losses[SAVED_AT:]) < 1e-5
    assert relative(after.grad_norms, expected.grad_norms[SAVED_AT:]) < 1e-5
    assert after.engine_state == {"adam_step": STEPS}


def test_a_resumed_run_ends_bit_for_bit_as_the_unbroken_one(measured, where):
    unbroken = logical_tensors(where / MOVED[0].name, STEPS)
    resumed = logical_tensors(where / f"moved-to-{MOVED[0].name}", STEPS)
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in unbroken.items())


def test_weights_that_have_not_trained_need_no_state(measured, references):
    assert_equal_curves(measured["from-untrained"], references["llama"])
