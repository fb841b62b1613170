"""Where DeepSpeed trains wrongly without a word, megagpt does not; without its guard, each run here shows the error.

Others are refused (tests/parallel/test_plan.py), or cannot come up: nothing of DeepSpeed's own checkpoints is used.
"""

from __future__ import annotations

import pytest

from tests.distributed.jobs import Job
from tests.distributed.layouts import STEPS, Layout, measure, relative
from tests.reference_loop import reference_run
from tests.tiny import run_config

SHARED_SEQUENCE = Layout(tensor=2, tensor_sequence=True)
PIPELINED = Layout(pipeline=2, tensor=2, tensor_sequence=True, accumulation=2)
TIED = Layout(pipeline=2, accumulation=4)
ACCUMULATING = Layout(accumulation=4)

HAZARDS = {
    "tied gradients": TIED,
    "whole activations": PIPELINED,
    "summed norms": SHARED_SEQUENCE,
    "tags": SHARED_SEQUENCE,
    "boundary": ACCUMULATING,
}
MISCOUNTED = {"boundary": 1}


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tokens):
    where = tmp_path_factory.mktemp("hazards")
    jobs = []
    for guard, layout in HAZARDS.items():
        config = run_config(where / "unused", tokens, *layout.words())
        for name, off in ((f"with {guard}", None), (f"without {guard}", guard)):
            jobs.append((layout, Job(name, config, 8, without=off, miscounted=MISCOUNTED.get(guard, 0))))
    return measure(jobs, where)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tokens):
    config = run_config(tmp_path_factory.mktemp("reference"), tokens, *Layout().words())
    return reference_run(config, STEPS)


@pytest.mark.parametrize("guard", HAZARDS)
def test_each_guard_is_needed_and_enough(guard, measured, reference):
    def error(name):
        found = measured[name]
        if found.diverged:  # it is seen, and ends the run
            return 1.0
        return max(relative(found.losses, reference.losses[:8]), relative(found.grad_norms, reference.grad_norms[:8]))

    assert error(f"with {guard}") < 1e-5
    assert error(f"without {guard}") > 1e-3
