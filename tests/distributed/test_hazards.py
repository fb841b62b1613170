"""Where DeepSpeed trains wrongly without a word, megagpt does not; without its guard, each run here shows the error.

Others are refused (tests/parallel/test_plan.py), or cannot come up: nothing of DeepSpeed's own checkpoints is used.
"""

from __future__ import annotations

import pytest

from tests.distributed.jobs import Job
from tests.distributed.layouts import Layout, measure, relative

SHARED_SEQUENCE = Layout(family="deep_gpt2", tensor=2, tensor_sequence=True)
PIPELINED = Layout(family="deep_gpt2", pipeline=2, tensor=2, tensor_sequence=True, accumulation=2)
TIED = Layout(family="deep_gpt2", pipeline=2, accumulation=4)
ACCUMULATING = Layout(family="deep_gpt2", accumulation=4)

HAZARDS = {
    "tied gradients": TIED,
    "whole activations": PIPELINED,
    "summed norms": SHARED_SEQUENCE,
    "tags": SHARED_SEQUENCE,
    "boundary": ACCUMULATING,
}
MISCOUNTED = {"boundary": 1}


@pytest.fixture(scope="module")
def measured(where, configured):
    jobs = []
    for guard, layout in HAZARDS.items():
        config = configured(layout)
        for name, off in ((f"with {guard}", None), (f"without {guard}", guard)):
            jobs.append((layout, Job(name, config, 8, without=off, miscounted=MISCOUNTED.get(guard, 0))))
    return measure(jobs, where)


@pytest.mark.parametrize("guard", HAZARDS)
def test_each_guard_is_needed_and_enough(guard, measured, references):
    reference = references["deep_gpt2"]

    def error(name):
        found = measured[name]
        if found.diverged:  # it is seen, and ends the run
            return 1.0
        return max(relative(found.losses, reference.losses[:8]), relative(found.grad_norms, reference.grad_norms[:8]))

    assert error(f"with {guard}") < 1e-5
    assert error(f"without {guard}") > 1e-3
