"""Which of `eval.tasks` training scores, and what it says of the others; before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evals.live import LiveBenchmarks, load_live_benchmarks
from megagpt.config.schema import ParallelSection, TrainingRun
from megagpt.errors import EvalError
from megagpt.parallel.mesh import make_mesh
from tests.evals.conftest import CONFIGS

SUITE = """
description: A suite with what training cannot score.
tasks:
  - {task: heldout}
  - {task: megagpt_smoke}
  - {task: humaneval}
"""
ALONE = "description: Nothing that training can score.\ntasks: [{task: heldout}, {task: humaneval}]\n"


def load(folder: Path, tokenizer, *tasks: str) -> LiveBenchmarks:
    (folder / "suites").mkdir(exist_ok=True)
    (folder / "suites" / "all.yaml").write_text(SUITE)
    (folder / "suites" / "none.yaml").write_text(ALONE)
    config = TrainingRun.model_validate_json(
        json.dumps(
            {
                "run": {"dir": str(folder / "run")},
                "model": CONFIGS["gpt2"].model_dump(mode="json"),
                "data": {"train": str(folder / "tokens")},
                "optim": {"lr": 1e-3},
                "train": {"max_steps": 10, "global_batch_size": 1, "micro_batch_size": 1},
                "eval": {"tasks": tasks, "tasks_every": 2},
            }
        )
    )
    mesh = make_mesh(0, 1, 0, torch.device("cpu"), ParallelSection())
    return load_live_benchmarks(config, tokenizer, mesh, folder / "suites")


def test_what_of_a_suite_training_cannot_score_is_left_out_and_said(tokenizer, tmp_path: Path) -> None:
    found = load(tmp_path, tokenizer, "all", "megagpt_smoke_generate")
    assert [member.task.task for member in found._members] == ["megagpt_smoke", "megagpt_smoke_generate"]
    heldout, humaneval = found.lines
    assert heldout == "eval.tasks: heldout is not scored during training: eval.every is for that"
    assert humaneval.startswith("eval.tasks: humaneval is not scored during training: humaneval runs code that the mod")
    assert "`megagpt eval run --tasks humaneval --allow-code`" in humaneval


def test_nothing_is_said_where_nothing_is_left_out(tokenizer, tmp_path: Path) -> None:
    assert load(tmp_path, tokenizer, "megagpt_smoke").lines == ()


@pytest.mark.parametrize(
    ("tasks", "fix"),
    [
        (("megagpt_smoke", "humaneval"), r"humaneval: humaneval runs code .*; write eval\.tasks=\[megagpt_smoke\]$"),
        (("heldout",), r"heldout: eval\.every is for that; leave eval\.tasks and eval\.tasks_every out$"),
        (("none",), r"heldout: .*; humaneval: .*; leave eval\.tasks and eval\.tasks_every out$"),
    ],
)
def test_what_is_named_by_itself_and_cannot_be_scored_is_an_error(tokenizer, tmp_path: Path, tasks, fix: str) -> None:
    with pytest.raises(EvalError, match=fix):
        load(tmp_path, tokenizer, *tasks)
