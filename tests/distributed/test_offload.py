"""State in host memory, and weights made in parts: the same training as one process without DeepSpeed."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import KINDS, SliceReader
from megagpt.data.mixture import open_mixture
from megagpt.model.build import build_model
from megagpt.model.flops import parameter_count
from megagpt.model.init import init_weights
from megagpt.model.loss import next_token_nll
from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.offload_jobs import (
    construct,
    run_with_deepspeeds_accumulation,
    run_with_deepspeeds_tied_reduction,
    zero_0_in_bf16,
)
from tests.distributed.processes import start
from tests.reference_loop import Curve, reference_run
from tests.tiny import run_config

STEPS = 20
BATCH = 8


@dataclass(frozen=True, order=True)
class Layout:
    name: str
    family: str = "gpt2"
    stage: int = 1
    words: tuple[str, ...] = ()
    accumulation: int = 2
    world_size: int = 2
    tensor: int = 1
    pipeline: int = 1

    @property
    def group(self) -> tuple[int, int, int]:
        return self.world_size, self.tensor, self.pipeline

    def all_words(self) -> list[str]:
        data_parallel = self.world_size // self.tensor // self.pipeline
        return [
            f"train.max_steps={STEPS}",
            f"train.micro_batch_size={BATCH // data_parallel // self.accumulation}",
            f"parallel.zero_stage={self.stage}",
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            *self.words,
        ]


CPU = ("parallel.offload_optimizer=cpu",)
BOTH = (*CPU, "parallel.offload_weights=cpu", "parallel.keep_gathered_below_elements=0")
WEIGHTS = ("parallel.offload_weights=cpu", "parallel.keep_gathered_below_elements=100")
BF16 = ("train.dtype=bf16",)
SMALL_BUCKETS = (
    "parallel.reduce_bucket_elements=500",
    "parallel.prefetch_elements=300",
    "parallel.max_live_elements=3000",
    "parallel.update_elements=1000",
    "parallel.overlap_communication=false",
)

FAST = [
    Layout("zero1", words=CPU, accumulation=4),
    Layout("zero3-both", "gpt2", 3, (*BOTH, *SMALL_BUCKETS), 4),
]
PIPELINED = [Layout("pipelined", words=CPU, accumulation=4, pipeline=2)]
SLOW = [
    Layout(f"{family}-{group}-zero{stage}-{kind}-acc{accumulation}", family, stage, words, accumulation, *group)
    for family, group, (stage, kind, words), accumulation in product(
        ("gpt2", "llama"),
        ((1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1)),
        (
            (1, "cpu", CPU),
            (2, "cpu", CPU),
            (3, "cpu", CPU),
            (3, "weights", WEIGHTS),
            (3, "both", BOTH),
            (3, "small", (*BOTH, *SMALL_BUCKETS)),
        ),
        (1, 4),
    )
]
SLOW += [
    Layout("zero2", "llama", 2, (*CPU, "parallel.reduce_bucket_elements=500", "parallel.overlap_communication=true")),
    Layout("zero3", "llama", 3, CPU),
] + [
    Layout(f"{family}-pipelined-{group}", family, 1, CPU, 2, *group)
    for family, group in product(("gpt2", "llama"), ((2, 1, 2), (4, 1, 2), (4, 2, 2)))
]
REGATHERED = ("parallel.shard_within_node=2", "parallel.keep_gathered_below_elements=0")
WITHIN_NODE = Layout("within-node", "gpt2", 3, REGATHERED, 2, 4)
LOW_PRECISION = [
    Layout("bf16-zero1", words=(*CPU, *BF16)),
    Layout("bf16-zero3", stage=3, words=(*BOTH, *BF16)),
]
SLOW_LOW_PRECISION = [
    Layout("bf16-zero2", stage=2, words=(*CPU, *BF16)),
    Layout("fp16-zero2", stage=2, words=(*CPU, "train.dtype=fp16")),
    Layout("fp16-zero3", stage=3, words=(*BOTH, "train.dtype=fp16")),
]


def by_name(layout):
    return layout.name


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def configured(where, tokens):
    def make(layout, *overrides):
        words = ["model.n_head=4", "model.d_model=32"] if layout.family == "gpt2" else []
        return run_config(where / "unused", tokens, *words, *layout.all_words(), *overrides, family=layout.family)

    return make


@pytest.fixture(scope="module")
def references(configured) -> dict[str, Curve]:
    return {family: reference_run(configured(Layout("", family)), STEPS) for family in ("gpt2", "llama")}


def measure(jobs, where, run=run_jobs, name=""):
    """Run (layout, job) pairs, a group of processes for each mesh, one after the other."""
    groups = defaultdict(list)
    for layout, job in jobs:
        groups[layout.group].append(job)
    found: dict[str, Measured] = {}
    for group, members in groups.items():
        path = where / f"{name}{'-'.join(map(str, group))}"
        start(run, group[0], members, path.with_suffix(".json"), log=path.with_suffix(".log")).finish(3000)
        found |= read_measured(path.with_suffix(".json"))
    return found


@pytest.fixture(scope="module")
def measured(where, configured):
    """All that the fast tests look at, in two groups of two processes."""
    layouts = [*FAST, *PIPELINED, *LOW_PRECISION]
    jobs = [(layout, Job(layout.name, configured(layout), STEPS)) for layout in layouts]
    jobs += moves(MOVES, where, configured)
    return measure(jobs, where)


def relative(found, expected):
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def equals(found, reference):
    assert relative(found.losses, reference.losses) < 1e-5
    assert relative(found.grad_norms, reference.grad_norms) < 1e-5


@pytest.mark.parametrize("layout", [*FAST, *PIPELINED], ids=by_name)
def test_loss_and_gradient_norm_equal_the_plain_loop(layout, measured, references):
    equals(measured[layout.name], references[layout.family])


def test_the_plain_loop_clips_and_learns_so_that_equality_means_something(references):
    for reference in references.values():
        assert sum(norm > 0.5 for norm in reference.grad_norms) >= STEPS - 5
        assert reference.losses[-1] < reference.losses[0] - 0.5


@pytest.mark.parametrize("layout", LOW_PRECISION, ids=by_name)
def test_low_precision_stays_near_fp32(layout, measured, references):
    assert 1e-6 < relative(measured[layout.name].losses, references["gpt2"].losses) < 2e-3
    assert not any(measured[layout.name].skipped)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("group", sorted({layout.group for layout in SLOW}), ids=str)
def test_every_layout_equals_the_plain_loop(group, where, configured, references):
    layouts = [layout for layout in SLOW if layout.group == group]
    found = measure([(layout, Job(layout.name, configured(layout), STEPS)) for layout in layouts], where, name="slow")
    for layout in layouts:
        equals(found[layout.name], references[layout.family])


@pytest.mark.exhaustive
def test_low_precision_stays_near_fp32_in_every_stage(where, configured, references):
    jobs = [(layout, Job(layout.name, configured(layout), STEPS)) for layout in SLOW_LOW_PRECISION]
    found = measure(jobs, where, name="low")
    for layout in SLOW_LOW_PRECISION:
        assert 1e-6 < relative(found[layout.name].losses, references["gpt2"].losses) < 2e-3
        assert not any(found[layout.name].skipped)


COMPARED = 5
"""Steps; further on bf16 itself makes the norms differ."""
PIPELINED_BF16 = Layout("pipelined-bf16", words=(*CPU, *BF16), accumulation=4, pipeline=2)
PIPELINED_FP16 = Layout("pipelined-fp16", words=("train.dtype=fp16",), accumulation=4, pipeline=2)


@pytest.fixture(scope="module")
def tied(where, configured):
    """With our addition of a tied head's gradients, and with DeepSpeed's own."""
    jobs = [(one, Job(one.name, configured(one), COMPARED)) for one in (PIPELINED_BF16, PIPELINED_FP16)]
    return [
        measure(jobs, where, name="ours"),
        measure(jobs, where, run_with_deepspeeds_tied_reduction, name="theirs"),
    ]


@pytest.mark.parametrize("layout", [PIPELINED_BF16, PIPELINED_FP16], ids=by_name)
def test_a_tied_head_in_a_pipeline_gets_the_whole_gradient_also_in_another_type(layout, tied, references):
    """Where the second half fails, DeepSpeed adds them up itself: `_add_up_tied_gradients` may go."""
    ours, theirs = (found[layout.name] for found in tied)
    losses, norms = references["gpt2"].losses[:COMPARED], references["gpt2"].grad_norms[:COMPARED]
    assert relative(ours.losses, losses) < 2e-3
    assert relative(ours.grad_norms, norms) < 1e-2
    assert relative(theirs.grad_norms, norms) > 5e-2


REDUCED_IN_FP32 = ("parallel.extra={communication_data_type: fp32}",)
# One process and eight micro-batches: nothing but the type in which they are added up can make a difference.
SUMMED = [
    Layout(f"zero{stage}-{kind}", "gpt2", stage, (*BF16, *words), 8, world_size=1)
    for stage, kind, words in (
        (1, "device", ()),
        (1, "cpu", CPU),
        (1, "cpu-fp32", (*CPU, *REDUCED_IN_FP32)),
        (2, "cpu", CPU),
        (3, "both", BOTH),
    )
]


def gradients_added_up_in_fp32(config):
    """Of the first step, from bf16 gradients of each micro-batch, clipped."""
    model = build_model(config.model)
    init_weights(model, config.run.seed)
    model = model.bfloat16()
    mixture = open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)
    sums = {name: torch.zeros(parameter.shape) for name, parameter in model.named_parameters()}
    for index in range(BATCH):
        tokens = torch.from_numpy(mixture.sample(index))[None]
        targets = BATCH * config.model.max_seq_len
        (next_token_nll(model(tokens[:, :-1]), tokens[:, 1:]) / targets).backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.float()
        model.zero_grad()
    norm = torch.nn.utils.get_total_norm(list(sums.values()))
    return {name: gradient * config.optim.grad_clip / norm for name, gradient in sums.items()}


def test_bf16_gradients_are_added_up_in_fp32(where, configured):
    """Where the last line fails, DeepSpeed does so by itself: grad_accum_dtype in ds_config.py may go."""
    expected = gradients_added_up_in_fp32(configured(SUMMED[0]))
    size = torch.nn.utils.get_total_norm(list(expected.values()))
    errors = {}
    for whose, run in (("ours", run_jobs), ("theirs", run_with_deepspeeds_accumulation)):
        jobs = [(one, Job(one.name, configured(one), 1, save=where / f"{whose}-{one.name}")) for one in SUMMED]
        measure(jobs, where, run, name=f"sum-{whose}")
        for one in SUMMED:
            found = logical_tensors(where / f"{whose}-{one.name}", 1)
            off = [found[f"{name}|exp_avg"] / 0.1 - gradient for name, gradient in expected.items()]
            errors[whose, one.name] = float(torch.nn.utils.get_total_norm(off) / size)
    for one in SUMMED:
        # ZeRO-1 reduces the finished sum, and that by default in bf16: it is rounded once.
        once = one.stage == 1 and "fp32" not in one.name
        assert errors["ours", one.name] < (2e-3 if once else 1e-5)
        assert errors["theirs", one.name] > 3e-3


def test_the_optimizer_in_host_memory_has_the_class_that_shards(measured):
    assert measured["zero1"].optimizer == measured["bf16-zero1"].optimizer == "DeepSpeedZeroOptimizer"
    assert measured["bf16-zero3"].optimizer == "DeepSpeedZeroOptimizer_Stage3"


def test_zero_0_in_bf16_makes_an_update_before_the_first_step(tmp_path):
    """Why plan.py refuses it. Where this fails, that refusal may go."""
    out = tmp_path / "out.json"
    start(zero_0_in_bf16, 1, out, log=tmp_path / "log").finish()
    found = json.loads(out.read_text())
    assert found["steps"] == [1, 1]
    assert found["shrunk"] == pytest.approx(0.95, rel=1e-2)  # 1 - lr x weight decay


WRITTEN_AT, END = 3, 5
PLACES = {
    "1p": Layout("1p", "llama", 2, world_size=1),
    "zero1": Layout("zero1", "llama", 1),
    "zero1-cpu": Layout("zero1-cpu", "llama", 1, CPU),
    "zero2-cpu": Layout("zero2-cpu", "llama", 2, CPU),
    "zero3": Layout("zero3", "llama", 3),
    "zero3-cpu": Layout("zero3-cpu", "llama", 3, CPU),
    "zero3-both": Layout("zero3-both", "llama", 3, (*BOTH, *SMALL_BUCKETS)),
    "tensor2-zero3-both": Layout("tensor2-zero3-both", "llama", 3, BOTH, world_size=4, tensor=2),
    "pipelined-cpu": Layout("pipelined-cpu", "llama", 1, CPU, pipeline=2),
    "within-node": Layout("within-node", "llama", 3, WITHIN_NODE.words, world_size=4),
}
MOVES = [("zero1-cpu", "zero3-both"), ("zero3-both", "zero1")]
MORE_MOVES = [("zero3", "zero2-cpu"), ("zero1", "zero3-cpu"), ("zero1", "within-node"), ("zero2-cpu", "pipelined-cpu")]


def moves(pairs, where, configured):
    """Jobs that write a checkpoint in each place, and that read it in the other, save what they read, and go on."""
    odd = ("model.d_ff=44", "model.n_layer=2")  # ZeRO's parts cut through rows, and the last ones are padded
    jobs = []
    for one in sorted({writer for writer, _ in pairs}):
        job = Job(f"write-{one}", configured(PLACES[one], *odd), WRITTEN_AT, save=where / f"write-{one}")
        jobs.append((PLACES[one], job))
    for writer, reader in pairs:
        load = CheckpointStore(where / f"write-{writer}").step_dir(WRITTEN_AT)
        name, config = f"{writer}-to-{reader}", configured(PLACES[reader], *odd)
        jobs.append((PLACES[reader], Job(name, config, END, load=load, save_loaded=where / name)))
    return jobs


def logical_tensors(folder, step):
    step_dir = CheckpointStore(folder).step_dir(step)
    with SliceReader(rank_files(step_dir, read_manifest(step_dir))) as reader:
        return {f"{name}|{kind}": reader.read_whole(name, kind) for name in reader.shapes for kind in KINDS}


def moved_bit_for_bit(pairs, measured, where, configured):
    reference = reference_run(configured(PLACES["1p"], "model.d_ff=44", "model.n_layer=2"), END)
    for writer, reader in pairs:
        name = f"{writer}-to-{reader}"
        written, held = (logical_tensors(where / one, WRITTEN_AT) for one in (f"write-{writer}", name))
        assert written.keys() == held.keys()
        for key, tensor in written.items():
            assert torch.equal(tensor, held[key]), (name, key)
            assert key.endswith("|weight") or tensor.abs().max() > 0, (name, key)
        assert relative(measured[name].losses, reference.losses[WRITTEN_AT:END]) < 1e-5
        assert relative(measured[name].grad_norms, reference.grad_norms[WRITTEN_AT:END]) < 1e-5
        assert measured[name].engine_state == {"adam_step": END}


def test_checkpoints_move_into_host_memory_and_out_of_it_bit_for_bit(measured, where, configured):
    moved_bit_for_bit(MOVES, measured, where, configured)


@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("pairs", [MORE_MOVES, list(product(PLACES, PLACES))], ids=["some", "all"])
def test_checkpoints_move_between_places_bit_for_bit(pairs, tmp_path, configured):
    # All writers first: a group of processes would wait for what a later one writes.
    jobs = moves(pairs, tmp_path, configured)
    found = measure([one for one in jobs if one[1].load is None], tmp_path, name="write")
    found |= measure([one for one in jobs if one[1].load is not None], tmp_path, name="read")
    moved_bit_for_bit(pairs, found, tmp_path, configured)


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_second_copy_of_the_weights_within_a_node_changes_nothing(where, configured, references):
    found = measure([(WITHIN_NODE, Job("within-node", configured(WITHIN_NODE), STEPS))], where, name="node")
    equals(found["within-node"], references["gpt2"])


# 15 million parameters, 59 MB in fp32; the largest is the embedding, 4 MB.
LARGE = (
    "model.vocab_size=4096",
    "model.d_model=256",
    "model.n_head=4",
    "model.n_layer=16",
    "train.micro_batch_size=1",
    "parallel.keep_gathered_below_elements=0",
)
SMALL = (("gpt2", ()), ("llama", ("model.d_ff=37", "train.dtype=bf16", *BOTH)))


def test_no_process_ever_holds_the_whole_model_under_zero_3(tokens, tmp_path):
    peaks = {}
    for stage, words in ((3, LARGE), (2, LARGE[:-1])):
        large = run_config(tmp_path / "unused", tokens, *words, f"parallel.zero_stage={stage}")
        small = [run_config(tmp_path / "unused", tokens, "parallel.zero_stage=3", *extra, family=family)
                 for family, extra in SMALL] if stage == 3 else []  # fmt: skip
        start(construct, 2, large, small, tmp_path, log=tmp_path / f"{stage}.log").finish()
        peaks[stage] = max(json.loads((tmp_path / "peaks.json").read_text()))
    whole = 4 * parameter_count(large.model)
    largest = 4 * large.model.vocab_size * large.model.d_model
    assert peaks[3] < whole / 2 + 4 * largest < 0.85 * whole
    assert peaks[2] > whole
    parts_are_those_of_one_process(tokens, tmp_path)


def parts_are_those_of_one_process(tokens, folder):
    for index, (family, extra) in enumerate(SMALL):
        config = run_config(folder / "unused", tokens, *extra, family=family)
        whole = build_model(config.model)
        init_weights(whole, config.run.seed)
        parts = [torch.load(folder / f"{rank}-{index}.pt") for rank in range(2)]
        assert [name for name, _ in whole.named_parameters()] == list(parts[0]) == list(parts[1])
        for name, weight in whole.named_parameters():
            joined = torch.cat([part[name] for part in parts])[: weight.numel()].view_as(weight)
            assert torch.equal(joined, weight.to(joined.dtype)), name
