"""With documents kept apart, every layout trains as a plain loop does that runs each document by itself."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megagpt.data.indexed import TokenFileWriter
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from tests.distributed.jobs import Measured
from tests.distributed.layouts import (
    STEPS,
    Layout,
    by_name,
    check,
    check_clips_and_learns,
    configuration,
    measure,
    relative,
    training_jobs,
)
from tests.distributed.processes import start, train_command
from tests.reference_loop import Curve, reference_run
from tests.tiny import VOCAB_SIZE, run_config, run_words

SEQ = 32
END = 0
"""The last token of every document, and of nothing else: here it tells where documents end, and the index does not."""
FAMILIES = {"gpt2": (), "llama": ("model.qk_norm=true",)}
COMMON = (f"model.max_seq_len={SEQ}", f"train.max_steps={STEPS}", "data.isolate_documents=true")


def isolated(family: str = "gpt2", **others) -> Layout:
    more = ("model.n_layer=4", *FAMILIES[family], *COMMON)
    return Layout(family=family, more=more, label="isolated", **others)


FAST = [
    isolated(data=2, accumulation=4),
    isolated("llama", data=2, zero=3, recompute="full"),
    isolated(tensor=2, zero=2, tensor_sequence=True, recompute="selective"),
    isolated(pipeline=2, accumulation=4),
    isolated("llama", pipeline=2, accumulation=4, schedule="dualpipev"),
    isolated("llama", sequence=2, accumulation=4),
]
MORE = [
    isolated(data=2, zero=3, recompute="full"),
    isolated("llama", data=2, zero=0, accumulation=2, recompute="selective"),
    isolated("llama", tensor=2, accumulation=2),
    isolated("llama", pipeline=2, accumulation=4, recompute="full"),
    isolated(sequence=2, zero=3),
]
WITHOUT_PIPELINE = [
    isolated(family, zero=zero, **cut)
    for family, zero, cut in product(
        FAMILIES, range(4), ({"data": 2}, {"tensor": 2}, {"tensor": 2, "tensor_sequence": True})
    )
]
PIPELINES = [
    isolated(family, pipeline=2, accumulation=4, **more)
    for family, more in product(
        FAMILIES,
        (
            {},
            {"schedule": "dualpipev"},
            {"recompute": "selective"},
            {"schedule": "dualpipev", "recompute": "full"},
            {"tensor": 2},
            {"tensor": 2, "tensor_sequence": True},
            {"tensor": 2, "tensor_sequence": True, "schedule": "dualpipev"},
        ),
    )
]
OTHERS = [
    isolated(family, accumulation=2, **cut)
    for family, cut in product(
        FAMILIES,
        (
            {"pipeline": 2, "data": 2},
            {"sequence": 2, "tensor": 2, "tensor_sequence": True},
            {"sequence": 2, "pipeline": 2},
            {"sequence": 2, "data": 2, "zero": 2},
        ),
    )
]
SLOW = [layout for layout in MORE + WITHOUT_PIPELINE + PIPELINES + OTHERS if layout not in FAST]


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
def configured(packed_tokens):
    return lambda layout: configuration(layout, packed_tokens)


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
        family: reference_run(configured(isolated(family)), STEPS, torch.float64, each_document_alone)
        for family in FAMILIES
    }


@pytest.fixture(scope="module")
def measured(configured, where) -> dict[str, Measured]:
    return measure(training_jobs(FAST, configured), where)


@pytest.mark.parametrize("layout", FAST, ids=by_name)
def test_every_layout_equals_the_loop_over_single_documents(layout, measured, references):
    check(measured[layout.name], references[layout.family])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_all_layouts_equal_the_loop_over_single_documents(configured, references, tmp_path):
    measured = measure(training_jobs(SLOW, configured), tmp_path)
    for layout in SLOW:
        check(measured[layout.name], references[layout.family])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_clips_and_learns_and_differs_from_one_that_packs(family, references, configured):
    reference = references[family]
    check_clips_and_learns(reference)
    packing = reference_run(configured(isolated(family)), 2)
    assert relative(packing.losses, reference.losses[:2]) > 1e-4
    assert relative(packing.grad_norms, reference.grad_norms[:2]) > 1e-2


def test_the_validation_loss_is_that_of_single_documents_with_and_without_a_pipeline(packed_tokens, tmp_path):
    words = [*COMMON, "train.max_steps=2", "optim.warmup_steps=1"]
    words += [f"data.val={packed_tokens}", "eval.every=2", "eval.sequences=11"]
    curves = []
    for n, more in ((1, ["parallel.zero_stage=3"]), (2, ["parallel.pipeline=2", "train.micro_batch_size=4"])):
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
