"""What processes that evaluate together do; for `processes.start`."""

from __future__ import annotations

import io
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from evals.forwards import PlanRunner
from evals.run import EvalRequest
from evals.together import Layout, run_together
from megagpt.config.schema import ParallelSection
from megagpt.engine.engine import init_distributed
from megagpt.errors import EvalError, MegaGPTError
from megagpt.model.scoring import score_logits
from megagpt.parallel.collectives import TensorRegion
from megagpt.parallel.cross_entropy import vocab_parallel_scores
from megagpt.parallel.mesh import make_mesh
from megagpt.parallel.tensor import vocabulary_shard
from megagpt.train.command import Launch


def evaluate(request: EvalRequest, layout: Layout, fault: str | None = None) -> int:
    """`launch/evaluate.py` behind its command line; on rank 1 something may go wrong."""
    launch = Launch.from_environment(os.environ)
    console = Console(file=io.StringIO(), quiet=launch.rank != 0)
    if launch.rank == 1 and fault == "other limit":
        request = replace(request, limit=5)
    spoilt = patch.object(PlanRunner, *FAULTS[fault]) if launch.rank == 1 and fault in FAULTS else nullcontext()
    try:
        with spoilt:
            run_together(request, launch, layout, console)
    except MegaGPTError as error:
        sys.stdout.write(f"rank {launch.rank}: {error}\n")
        sys.stdout.flush()
        return error.exit_code
    return 0


def _refuses(*_: object) -> None:
    raise EvalError("this question has no answer")


def _crashes(*_: object) -> None:
    raise RuntimeError("out of something")


def _crashes_at_the_third_batch(runner: PlanRunner, *answers: Any) -> None:
    if runner.n_forwards == 3:
        _crashes()
    COLLECT(runner, *answers)


COLLECT = PlanRunner._collect
FAULTS = {
    "an error of ours": ("run", _refuses),
    "a crash": ("run", _crashes),
    "a late crash": ("_collect", _crashes_at_the_third_batch),
}


def score_cut_vocabulary() -> None:
    """Two processes, 61 columns: three of the second one's are padding, with the largest logits of all."""
    init_distributed(timedelta(seconds=60), device_type="cpu")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = make_mesh(rank, size, rank, torch.device("cpu"), ParallelSection(tensor=size))
    region = TensorRegion(mesh.groups.tensor, size, rank)
    shard = vocabulary_shard(61, 8, region)
    ((start, held),) = shard.spans
    whole = torch.randn(40, 61, generator=torch.Generator().manual_seed(0)).round()  # ties, also across processes
    logits = torch.full((40, shard.local_size), 1e4)
    logits[:, :held] = whole[:, start : start + held]
    rows = torch.arange(40).repeat_interleave(61)
    targets = torch.arange(61).repeat(40)
    expected, first = score_logits(whole, rows, targets)
    values, greedy = vocab_parallel_scores(logits, rows, targets, shard, mesh.groups.tensor)
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-6)
    assert torch.equal(greedy, first)
    assert int(greedy.sum()) == 40
    assert int((whole == whole.amax(1, keepdim=True)).sum()) > 80, "there are ties"
    mesh.barrier()
    torch.distributed.destroy_process_group()


def requests(run_dir: Path, out: Path, batch_size: int = 4) -> EvalRequest:
    """Held-out loss, multiple choice, generation: every kind of request, in the order of the suites."""
    tasks = ("heldout", "megagpt_smoke", "megagpt_smoke_generate")
    return EvalRequest(run_dir, tasks, limit=18, batch_size=batch_size, out=out, suites_dir=Path("none"))
