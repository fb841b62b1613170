"""Compiled blocks train as one process without DeepSpeed and without a compiler does."""

from __future__ import annotations

import pytest

from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.processes import start
from tests.reference_loop import reference_run
from tests.tiny import run_config

STEPS = 20
LAYOUTS = {
    "1p-zero1": (1, "gpt2", "parallel.zero_stage=1", "train.micro_batch_size=8"),
    "1p-zero1-full": (1, "llama", "parallel.zero_stage=1", "train.recompute=full"),
    "1p-zero0": (1, "llama", "parallel.zero_stage=0"),
    "2p-zero1": (2, "llama", "parallel.zero_stage=1"),
    "2p-zero2-full": (2, "gpt2", "parallel.zero_stage=2", "train.recompute=full"),
    "pipeline": (2, "gpt2", "parallel.zero_stage=1", "parallel.pipeline=2"),
    "pipeline-full": (2, "llama", "parallel.zero_stage=1", "parallel.pipeline=2", "train.recompute=full"),
}
GROUPS = {
    "one": [name for name in LAYOUTS if name.startswith("1p")],
    "two": [name for name in LAYOUTS if name.startswith("2p")],
    "pipeline": [name for name in LAYOUTS if name.startswith("pipeline")],
}


def configured(name, tokens, *more):
    _, family, *overrides = LAYOUTS[name]
    return run_config(tokens.parent / "unused", tokens, f"train.max_steps={STEPS}", *overrides, *more, family=family)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, tokens) -> dict[str, Measured]:
    where = tmp_path_factory.mktemp("compile")
    found = {}
    for group, names in GROUPS.items():  # one after the other: each compiles
        jobs = [Job(name, configured(name, tokens, "train.compile=true"), STEPS) for name in names]
        start(run_jobs, LAYOUTS[names[0]][0], jobs, where / f"{group}.json", log=where / f"{group}.log").finish(800.0)
        found |= read_measured(where / f"{group}.json")
    return found


@pytest.mark.exhaustive
@pytest.mark.timeout(2700)
@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_blocks_give_the_losses_and_norms_of_the_plain_loop(name, measured, tokens):
    expected = reference_run(configured(name, tokens), STEPS)
    assert measured[name].losses == pytest.approx(expected.losses, rel=1e-5)
    assert measured[name].grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
