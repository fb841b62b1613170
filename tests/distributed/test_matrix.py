"""Every allowed layout up to eight processes trains as one process without DeepSpeed does.

`make test-matrix` runs all of it. What is allowed is asked of the product's own table; which accumulation, which
recomputation and which place of the optimizer's state a layout gets goes round, so that all pairs come up.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from megagpt.errors import ConfigError
from megagpt.parallel.plan import plan_batches
from tests.distributed.jobs import Job, Measured
from tests.distributed.layouts import (
    STEPS,
    Layout,
    check_first_gradients,
    initial_weights,
    logical_tensors,
    measure,
    relative,
)
from tests.reference_loop import Curve, reference_run
from tests.tiny import run_config

LOG = logging.getLogger(__name__)
MOST_PROCESSES = 8
SEQ_LEN = 32
"""Tokens: a quarter of what the configurations say, so that all of it takes less than half an hour on two cores."""
LR = "optim.lr=1e-3"
"""The loss falls by a sixth in 20 steps. At 3e-3 these models have a spike (gradient norms up to 8.7), and behind it
two runs that are equal to 1e-6 until then are 4e-5 apart, whatever the layout."""
MODELS = {"gpt2_tiny": "gpt2", "llama_tiny": "llama"}
"""Of configs/model -> their family."""

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(2400)]


def configuration(layout, where, tokens):
    file = Path(__file__).resolve().parents[2] / "configs" / "model" / f"{layout.family}.yaml"
    sizes = YAML(typ="safe").load(file)["model"]
    sizes["max_seq_len"] = SEQ_LEN
    words = [f"model.{key}={value}" for key, value in sizes.items()]
    return run_config(where / "unused", tokens, *words, *layout.words(), LR, family=MODELS[layout.family])


def is_allowed(layout, where, tokens) -> bool:
    try:
        plan_batches(configuration(layout, where, tokens), layout.world_size)
    except ConfigError:
        return False
    return True


def every_layout(where, tokens):
    """All that the table allows, in fp32; then each way of cutting a model once in bf16, in one family or the other.

    ZeRO shards over a pair along the sequence axis, or along the data axis where that makes four processes or fewer.
    """
    extras = cycle(product((1, 4), ("none", "selective", "full")))
    offloads = cycle((False, True))
    found = []
    axes = product(MODELS, (1, 2, 4), (1, 2), (1, 2, 4), (0, 1, 2, 3), (False, True))
    for family, pipeline, sequence, tensor, zero, tensor_sequence in axes:
        layout = Layout(
            family=family,
            pipeline=pipeline,
            data=2 if sequence == 1 and pipeline * tensor <= 2 else 1,
            sequence=sequence,
            tensor=tensor,
            zero=zero,
            tensor_sequence=tensor_sequence,
        )
        if layout.world_size <= MOST_PROCESSES and is_allowed(layout, where, tokens):
            accumulation, recompute = next(extras)
            layout = replace(layout, accumulation=accumulation, recompute=recompute)
            offloaded = replace(layout, offload=next(offloads))
            found.append(offloaded if is_allowed(offloaded, where, tokens) else layout)
    vs = [replace(layout, schedule="dualpipev", accumulation=4) for layout in found if layout.pipeline == 2]
    found += [layout for layout in vs if is_allowed(layout, where, tokens)]
    cuts = sorted({(one.degrees, one.tensor_sequence, one.schedule) for one in found})
    family_of = dict(zip(cuts, cycle(MODELS)))
    by_cut = {
        cut: one
        for one in found
        for cut in [(one.degrees, one.tensor_sequence, one.schedule)]
        if one.zero and one.family == family_of[cut]
    }
    return found + [replace(layout, dtype="bf16") for layout in by_cut.values()]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def layouts(where, tokens) -> list[Layout]:
    return every_layout(where, tokens)


@pytest.fixture(scope="module")
def references(where, tokens) -> dict[str, Curve]:
    return {one: reference_run(configuration(Layout(family=one), where, tokens), STEPS) for one in MODELS}


@pytest.fixture(scope="module")
def measured(layouts, where, tokens) -> dict[str, Measured]:
    jobs = []
    for layout in layouts:
        first = where / layout.name if layout.dtype == "fp32" else None
        initial = where / f"initial-{layout.name}" if layout.dtype == "fp32" else None
        job = Job(layout.name, configuration(layout, where, tokens), STEPS, save_loaded=initial, save_first=first)
        jobs.append((layout, job))
    return measure(jobs, where, 2300)


def failures(layouts, looks_right):
    """Names of the layouts that are not as they should be: all of them are told, not the first."""
    return [layout.name for layout in layouts if not looks_right(layout)]


def test_all_pairs_of_choices_come_up(layouts):
    keys = ("pipeline", "sequence", "tensor", "zero", "tensor_sequence")
    for family, key, extra in product(MODELS, keys, ("accumulation", "recompute", "offload")):
        mine = [one for one in layouts if (one.family, one.schedule) == (family, "1f1b")]
        if extra == "offload":
            mine = [one for one in mine if one.zero]  # without ZeRO there is nothing to put elsewhere
        pairs = {(getattr(one, key), getattr(one, extra)) for one in mine}
        expected = product({getattr(one, key) for one in mine}, {getattr(one, extra) for one in mine})
        assert pairs == set(expected), (family, key, extra)


def test_loss_and_gradient_norm_equal_the_plain_loop(layouts, measured, references):
    fp32 = [layout for layout in layouts if layout.dtype == "fp32"]
    worst = {
        layout.name: max(
            relative(measured[layout.name].losses, references[layout.family].losses),
            relative(measured[layout.name].grad_norms, references[layout.family].grad_norms),
        )
        for layout in fp32
    }
    LOG.info("%d layouts, largest relative difference %.2g", len(fp32), max(worst.values()))
    assert {name: value for name, value in worst.items() if not value < 1e-5} == {}


def test_bf16_stays_within_two_thousandths(layouts, measured, references):
    bf16 = [layout for layout in layouts if layout.dtype == "bf16"]
    worst = {one.name: relative(measured[one.name].losses, references[one.family].losses) for one in bf16}
    LOG.info("%d layouts in bf16, largest relative difference %.2g", len(bf16), max(worst.values()))
    assert {name: value for name, value in worst.items() if not 1e-6 < value < 2e-3} == {}


def test_every_gradient_of_the_first_step_equals_the_plain_loops(layouts, measured, references, where, tokens):
    for layout in layouts:
        if layout.dtype == "fp32":
            assert layout.name in measured
            beta1 = configuration(layout, where, tokens).optim.betas[0]
            check_first_gradients(where / layout.name, references[layout.family].first_gradients, beta1)


def test_initial_weights_are_the_same_bit_for_bit(layouts, measured, where, tokens):
    expected = {one: initial_weights(configuration(Layout(family=one), where, tokens)) for one in MODELS}

    def looks_right(layout):
        found = logical_tensors(where / f"initial-{layout.name}", 0)
        return all(torch.equal(found[f"{name}|weight"], p) for name, p in expected[layout.family].items())

    fp32 = [layout for layout in layouts if layout.dtype == "fp32" and layout.name in measured]
    assert failures(fp32, looks_right) == []


def test_the_samples_are_the_same_in_the_same_order(layouts, measured):
    orders = {tuple(measured[layout.name].samples) for layout in layouts}
    assert len(orders) == 1
    assert len(set(orders.pop())) == STEPS


def test_replicas_are_equal_at_the_end(layouts, measured):
    assert failures(layouts, lambda layout: measured[layout.name].differing is None) == []
