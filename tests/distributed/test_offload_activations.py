"""Activations on the host change no number, whatever the layout."""

from __future__ import annotations

from itertools import product

import pytest

from tests.distributed.jobs import Job
from tests.distributed.layouts import Layout, by_name, measure

STEPS = 5
LAYOUTS = [
    Layout(data=2, zero=3, accumulation=2, more=("parallel.keep_gathered_below_elements=0",)),
    Layout(tensor=2, tensor_sequence=True, accumulation=4),
    Layout(pipeline=2, accumulation=4),
]
KINDS = ("none", "full")


@pytest.fixture(scope="module")
def measured(where, configured):
    jobs = []
    for layout, kind, offload in product(LAYOUTS, KINDS, ("false", "true")):
        config = configured(layout, f"train.recompute={kind}", f"train.offload_activations={offload}")
        jobs.append((layout, Job(f"{layout.name}-{kind}-{offload}", config, STEPS)))
    return measure(jobs, where)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
def test_losses_and_norms_are_those_without_it_bit_for_bit(layout, kind, measured, references):
    with_it, without = (measured[f"{layout.name}-{kind}-{offload}"] for offload in ("true", "false"))
    assert (with_it.losses, with_it.grad_norms) == (without.losses, without.grad_norms)
    assert with_it.losses == pytest.approx(references[layout.family].losses[:STEPS], rel=1e-5)
