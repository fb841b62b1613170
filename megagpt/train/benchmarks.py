"""What training knows of benchmarks: that something can score its model. The applications above bring it (`evals`)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megagpt.config.schema import TrainingRun
from megagpt.errors import ConfigError
from megagpt.parallel.decode import ParallelDecoder
from megagpt.parallel.mesh import Mesh
from megagpt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class BenchmarkScores:
    """What one evaluation found."""

    values: Mapping[str, float | None]
    """For metrics.jsonl: name -> number."""
    lines: Sequence[str]
    """For the terminal."""


class Benchmarks(Protocol):
    """Tasks that are loaded, on this process."""

    @property
    def lines(self) -> Sequence[str]:
        """What a user must know before training: what of `eval.tasks` is left out, and why."""

    def score(self, step: int, model: ParallelDecoder) -> BenchmarkScores:
        """Score them; every process of the run calls it. The main one writes the files."""


OpenBenchmarks = Callable[[TrainingRun, Tokenizer, Mesh], Benchmarks]
"""Load the tasks of `eval.tasks`; every process calls it before training begins, and all raise where one does."""


def open_benchmarks(
    config: TrainingRun, tokenizer: Tokenizer | None, mesh: Mesh, opener: OpenBenchmarks | None
) -> Benchmarks | None:
    """The run's benchmarks, or None where it has none.

    Raises:
        ConfigError: it wants some, and they cannot be had here.
        EvalError: a task that does not exist, or whose data cannot be reached.
    """
    if not config.eval.tasks_every:
        return None
    if tokenizer is None:
        raise ConfigError(
            "eval.tasks is set, but the token files have no manifest.json that names their tokenizer; "
            "set data.tokenizer, or leave eval.tasks out"
        )
    if opener is None:
        raise ConfigError("eval.tasks is set, which training started in this way cannot do; use launch/pretrain.py")
    return opener(config, tokenizer, mesh)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Whatever draws random numbers inside, those behind are the ones that would have come without it."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_state)
