"""With documents kept apart, every layout trains as a plain loop does that runs each document by itself."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megagpt.data.indexed import TokenFileWriter
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.processes import start, train_command
from tests.reference_loop import Curve, reference_run
from tests.tiny import VOCAB_SIZE, run_config, run_words

STEPS = 20
BATCH = 8
SEQ = 32
END = 0
"""The last token of every document, and of nothing else: here it tells where documents end, and the index does not."""
FAMILIES = {
    "gpt2": ("model.n_layer=4", "model.n_head=4", "model.d_model=32"),
    "llama": ("model.n_layer=4", "model.qk_norm=true"),
}


@dataclass(frozen=True)
class Layout:
    world_size: int
    family: str
    words: tuple[str, ...]
    accumulation: int = 1

    @property
    def parallel(self) -> tuple[int, ...]:
        """Tensor, pipeline and sequence."""
        chosen = dict(word.split("=") for word in self.words)
        return tuple(int(chosen.get(f"parallel.{axis}", 1)) for axis in ("tensor", "pipeline", "sequence"))

    @property
    def name(self) -> str:
        words = "-".join(word.rpartition(".")[2] for word in self.words)
        return f"{self.family}-{self.world_size}p-acc{self.accumulation}-{words}"

    def all_words(self) -> list[str]:
        micro = BATCH * math.prod(self.parallel) // self.world_size // self.accumulation
        return [*FAMILIES[self.family], *common(), *self.words, f"train.micro_batch_size={micro}"]


def common() -> list[str]:
    return [f"model.max_seq_len={SEQ}", f"train.max_steps={STEPS}", "data.isolate_documents=true"]


TP, SP, PP = "parallel.tensor=2", "parallel.tensor_sequence=true", "parallel.pipeline=2"
ULYSSES = "parallel.sequence=2"
V = "parallel.pipeline_schedule=dualpipev"
ZERO = [f"parallel.zero_stage={stage}" for stage in range(4)]
FULL, SELECTIVE = "train.recompute=full", "train.recompute=selective"
FAST = [
    Layout(2, "gpt2", (ZERO[1],), 4),
    Layout(2, "gpt2", (ZERO[3], FULL)),
    Layout(2, "llama", (ZERO[0], SELECTIVE), 2),
    Layout(2, "llama", (ZERO[3],)),
    Layout(2, "gpt2", (ZERO[3], TP, SP)),
    Layout(2, "llama", (ZERO[1], TP), 2),
    Layout(2, "gpt2", (PP,), 4),
    Layout(2, "llama", (PP, FULL), 4),
    Layout(2, "llama", (PP, V), 4),
    Layout(2, "gpt2", (ULYSSES, ZERO[3])),
    Layout(2, "llama", (ULYSSES, ZERO[1]), 4),
]
SLOW = [
    *(Layout(2, family, (zero,)) for family in FAMILIES for zero in ZERO),
    *(Layout(2, family, (zero, TP, *sp)) for family in FAMILIES for zero in ZERO for sp in ((), (SP,))),
    *(Layout(2, family, (PP, *more), 4) for family in FAMILIES for more in ((), (V,), (SELECTIVE,), (V, FULL))),
    *(Layout(4, family, (PP, TP, *more), 4) for family in FAMILIES for more in ((), (SP,), (V, SP))),
    *(Layout(4, family, (PP,), 2) for family in FAMILIES),
    *(Layout(4, family, (ULYSSES, *more), 2) for family in FAMILIES for more in ((TP, SP), (PP,), (ZERO[2],))),
]


def by_name(layout: Layout) -> str:
    return layout.name


@pytest.fixture(scope="module")
def packed_tokens(tmp_path_factory):
    """Documents from one token up; the most are shorter than a sample, and some are longer."""
    random = np.random.default_rng(5)
    prefix = tmp_path_factory.mktemp("packed") / "t"
    with TokenFileWriter(prefix, "<u2") as writer:
        for _ in range(500):
            token, document = int(random.integers(1, VOCAB_SIZE)), []
            for _ in range(int(random.choice([0, 1, 3, 8, 15, 40, 80]))):
                document.append(token)
                token = 1 + (3 * token + int(random.integers(0, 4))) % (VOCAB_SIZE - 1)
            writer.add_document([*document, END])
    return prefix


@pytest.fixture(scope="module")
def configured(tmp_path_factory, packed_tokens):
    unused = tmp_path_factory.mktemp("documents") / "unused"
    return lambda layout: run_config(unused, packed_tokens, *layout.all_words(), family=layout.family)


def each_document_alone(model, windows):
    """Mean loss of the targets that follow an input of their own document: one forward a document."""
    nll, targets = torch.zeros(()), 0
    for window in windows:
        ends = (window == END).nonzero()[:, 0] + 1
        for document in window.tensor_split(ends):
            if len(document) > 1:
                logits = model(document[None, :-1])[0]
                nll = nll + F.cross_entropy(logits, document[1:], reduction="sum")
                targets += len(document) - 1
    return nll / targets


@pytest.fixture(scope="module")
def references(configured) -> dict[str, Curve]:
    return {
        # In fp64: over 20 steps of many short forwards, the rounding of fp32 would come near the tolerance.
        family: reference_run(configured(Layout(1, family, ())), STEPS, torch.float64, each_document_alone)
        for family in FAMILIES
    }


def measure(layouts, configured, where) -> dict[str, Measured]:
    groups = defaultdict(list)
    for layout in layouts:
        groups[layout.world_size, layout.parallel].append(Job(layout.name, configured(layout), STEPS))
    found = {}
    for (world_size, parallel), jobs in groups.items():
        name = f"{world_size}-{parallel}"
        start(run_jobs, world_size, jobs, where / f"{name}.json", log=where / f"{name}.log").finish(1500)
        found |= read_measured(where / f"{name}.json")
    return found


@pytest.fixture(scope="module")
def measured(configured, tmp_path_factory):
    return measure(FAST, configured, tmp_path_factory.mktemp("measured"))


def relative(found, expected):
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def check(found, expected):
    assert relative(found.losses, expected.losses) < 1e-5
    assert relative(found.grad_norms, expected.grad_norms) < 1e-5


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_every_layout_equals_the_loop_over_single_documents(layout, measured, references):
    check(measured[layout.name], references[layout.family])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_all_layouts_equal_the_loop_over_single_documents(configured, references, tmp_path):
    measured = measure(SLOW, configured, tmp_path)
    for layout in SLOW:
        check(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_clips_and_learns_and_differs_from_one_that_packs(family, references, configured):
    reference = references[family]
    assert sum(norm > 0.5 for norm in reference.grad_norms) >= STEPS - 5
    assert reference.losses[-1] < reference.losses[0] - 0.5
    packing = reference_run(configured(Layout(1, family, ())), 2)
    assert relative(packing.losses, reference.losses[:2]) > 1e-4
    assert relative(packing.grad_norms, reference.grad_norms[:2]) > 1e-2


def test_the_validation_loss_is_that_of_single_documents_with_and_without_a_pipeline(packed_tokens, tmp_path):
    words = [*common(), "train.max_steps=2", "optim.warmup_steps=1"]
    words += [f"data.val={packed_tokens}", "eval.every=2", "eval.sequences=11"]
    curves = []
    for n, more in ((1, ["parallel.zero_stage=3"]), (2, [PP, "train.micro_batch_size=4"])):
        run_dir = tmp_path / f"{n}"
        command = run_words(run_dir, packed_tokens, *words, *more)
        start(train_command, n, command, log=tmp_path / f"log{n}").finish()
        rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        curves.append([row["val_loss"] for row in rows if "val_loss" in row])
    config = run_config(tmp_path, packed_tokens, *words)
    model = build_model(config.model)
    init_weights(model, config.run.seed)
    stream = np.fromfile(packed_tokens.with_name("t.bin"), dtype="<u2").astype(np.int64)
    n_windows = (len(stream) - 1) // SEQ
    starts = [i * n_windows // 11 * SEQ for i in range(11)]
    windows = torch.from_numpy(np.stack([stream[at : at + SEQ + 1] for at in starts]))
    with torch.no_grad():
        assert curves[0][0] == pytest.approx(each_document_alone(model, windows).item(), rel=1e-5)
    assert len(curves[0]) >= 2
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
