"""Processes of a verification from the tests' fork server, right ones and broken ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megagpt.verify.files import Files
from tests.distributed.processes import Group, start

Fault = Callable[[], None]
"""Breaks something in the process that calls it."""


@dataclass
class RunningGroup:
    group: Group

    def poll(self) -> int | None:
        codes = [process.exitcode for process in self.group.processes]
        if any(code for code in codes):
            return 1
        return None if None in codes else 0


def starting(fault: Fault | None = None) -> Any:
    """A `Start` whose processes are broken by `fault` first."""

    @contextmanager
    def started(files: Files, world_size: int) -> Iterator[RunningGroup]:
        group = start(work, world_size, files, fault, log=files.log)
        try:
            yield RunningGroup(group)
        finally:
            group.signal(signal.SIGKILL)

    return started


def work(files: Files, fault: Fault | None) -> int:
    from megagpt.verify.worker import exit_code_of

    if fault is not None:
        fault()
    return exit_code_of(files, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def no_sum_over_the_tensor_group() -> None:
    """Each process keeps its own part of the gradient of norms and biases."""
    from megagpt.parallel import apply_tensor

    apply_tensor.summed = lambda gradient, group: gradient


def decay_everything() -> None:
    from megagpt.train import build

    theirs = build.parameter_groups

    def one_group(model: Any, weight_decay: float) -> Any:
        parameters = [p for group in theirs(model, weight_decay) for p in group["params"]]
        return [{"params": parameters, "weight_decay": weight_decay}]

    build.parameter_groups = one_group


def initial_weights_by_rank() -> None:
    from megagpt.train import build

    theirs = build.init_weights
    build.init_weights = lambda model, seed: theirs(model, seed + int(os.environ["RANK"]))


def next_steps_samples() -> None:
    from megagpt.train.batches import TrainBatches

    theirs = TrainBatches.step
    TrainBatches.step = lambda self, step: theirs(self, step + 1)


def tied_gradients_apart() -> None:
    from megagpt.engine.pipeline import PipelinedEngine

    PipelinedEngine._add_up_tied_gradients = lambda self, engine: None


def clipping_left_out() -> None:
    from megagpt.engine import engine

    theirs = engine.ds_config
    engine.ds_config = lambda config, plan: theirs(config, plan) | {"gradient_clipping": 0.0}


def one_process_ends() -> None:
    if os.environ["RANK"] == "1":
        from megagpt.verify import worker

        def broken(*args: Any) -> None:
            raise OSError("no memory is left")

        worker.build_engine = broken


def one_process_hangs() -> None:
    if os.environ["RANK"] == "1":
        import time

        time.sleep(600)
