"""Activations on the host change no number, whatever the layout."""

from __future__ import annotations

import pytest

from tests.distributed.jobs import Job, read_measured, run_jobs
from tests.distributed.processes import start
from tests.reference_loop import reference_run
from tests.tiny import run_config

STEPS = 5
LAYOUTS = {
    "zero3": ("parallel.zero_stage=3", "parallel.extra.zero_optimization.stage3_param_persistence_threshold=0"),
    "tensor": ("parallel.tensor=2", "parallel.tensor_sequence=true", "model.n_head=4"),
    "pipeline": ("parallel.pipeline=2",),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_norms_are_those_without_it_bit_for_bit(layout, tokens, tmp_path):
    kinds = [(kind, offload) for kind in ("none", "full") for offload in ("false", "true")]
    jobs = [
        Job(f"{kind}-{offload}", run_config(tmp_path / "run", tokens, *LAYOUTS[layout], *words), STEPS)
        for kind, offload in kinds
        for words in [(f"train.recompute={kind}", f"train.offload_activations={offload}")]
    ]
    start(run_jobs, 2, jobs, tmp_path / "out.json", log=tmp_path / "log").finish()
    measured = read_measured(tmp_path / "out.json")
    reference = reference_run(jobs[0].config, STEPS)
    for kind in ("none", "full"):
        with_it, without = measured[f"{kind}-true"], measured[f"{kind}-false"]
        assert (with_it.losses, with_it.grad_norms) == (without.losses, without.grad_norms)
        assert with_it.losses == pytest.approx(reference.losses, rel=1e-5)
