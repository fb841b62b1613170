"""Compiled blocks train as one process without DeepSpeed and without a compiler does."""

from __future__ import annotations

import pytest

from tests.distributed.jobs import Measured
from tests.distributed.layouts import Layout, by_name, check, measure, training_jobs

COMPILED = {"more": ("train.compile=true",)}
LAYOUTS = [
    Layout(**COMPILED),
    Layout(family="llama", accumulation=4, recompute="full", **COMPILED),
    Layout(family="llama", accumulation=4, zero=0, **COMPILED),
    Layout(family="llama", data=2, accumulation=2, **COMPILED),
    Layout(data=2, accumulation=2, zero=2, recompute="full", **COMPILED),
    Layout(pipeline=2, accumulation=4, **COMPILED),
    Layout(family="llama", pipeline=2, accumulation=4, recompute="full", **COMPILED),
]


@pytest.fixture(scope="module")
def measured(where, configured) -> dict[str, Measured]:
    return measure(training_jobs(LAYOUTS, configured), where, 800.0)  # one after the other: each compiles


@pytest.mark.exhaustive
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("layout", LAYOUTS, ids=by_name)
def test_compiled_blocks_give_the_losses_and_norms_of_the_plain_loop(layout, measured, references):
    check(measured[layout.name], references[layout.family])
