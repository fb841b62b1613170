"""Benchmarks during training: what launch/pretrain.py hands to `megagpt.train`.

Imports little, so that runs without `eval.tasks` start as fast as ever.
"""

from __future__ import annotations

from megagpt.cli_base import configs_folder
from megagpt.config.schema import TrainingRun
from megagpt.parallel.mesh import Mesh
from megagpt.tokenizer import Tokenizer
from megagpt.train.benchmarks import Benchmarks


def open_benchmarks(config: TrainingRun, tokenizer: Tokenizer, mesh: Mesh) -> Benchmarks:
    """Load the tasks of `eval.tasks`. Every process of the run calls it.

    Raises:
        EvalError: on every process: a task that does not exist, or whose data cannot be reached.
    """
    from evals.live import load_live_benchmarks  # lm-eval takes seconds

    return load_live_benchmarks(config, tokenizer, mesh, configs_folder() / "evals")
