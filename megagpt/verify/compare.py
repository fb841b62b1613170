"""What the layout's processes did against what plain PyTorch did, one finding a kind of thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import MOMENTS, WEIGHT, SliceReader
from megagpt.config.schema import OptimSection, TrainingRun
from megagpt.errors import CheckpointError
from megagpt.verify.files import Files
from megagpt.verify.reference import Course

LOSS_ALLOWED = {"fp32": 1e-5, "bf16": 2e-3}
NORM_ALLOWED = {"fp32": 1e-5, "bf16": 5e-3}
"""bf16 rounds to 2**-9: of a small model's norm, summing in another order leaves up to 2.4e-3."""
TENSORS_ALLOWED = 1e-4
"""Of a tensor after the first step, in fp32: sums in another order move single elements more than a loss."""
SMALLEST_SCALE = 1e-3
"""A tensor whose largest element is below this part of the largest of all is compared with that part: a gradient that
is zero but for rounding has no digits of its own."""
TITLES = {"exp_avg": "first moments after step 1", "exp_avg_sq": "second moments after step 1"}


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether one kind of thing agrees."""

    run: str
    """Precision: fp32 or bf16."""
    what: str
    ok: bool
    difference: float | None = None
    """The largest relative one; None where things are compared bit for bit."""
    allowed: float | None = None
    first: str = ""
    """The first that differs: a tensor's name, or a step."""


def compare(config: TrainingRun, course: Course, files: Files, world_size: int) -> list[Finding]:
    """All findings of one run."""
    run = config.train.dtype
    seen = files.read_seen(run, world_size)
    found = [
        _samples(run, course, seen),
        _steps(run, "loss", course.losses, [one["losses"] for one in seen], LOSS_ALLOWED[run]),
        _steps(run, "gradient norm", course.grad_norms, [one["grad_norms"] for one in seen], NORM_ALLOWED[run]),
    ]
    if run == "fp32":
        store = CheckpointStore(files.checkpoints(run))
        found.insert(0, _with_checkpoint(run, store, 0, lambda reader: [_initial(run, course, reader)])[0])
        found += _with_checkpoint(run, store, 1, lambda reader: list(_tensors(run, course, reader, config.optim)))
    return found


def _samples(run: str, course: Course, seen: Sequence[dict[str, Any]]) -> Finding:
    """The samples of each step, put in order: micro-batch by micro-batch, and in it one process after the other."""
    what = f"samples and their order, {len(course.samples)} steps of {len(course.samples[0])}"
    by_rank: dict[int, list[list[list[str]]]] = {}
    for rank, one in enumerate(seen):
        samples = by_rank.setdefault(one["data_parallel_rank"], one["samples"])
        if samples != one["samples"]:
            return Finding(run, what, ok=False, first=f"process {rank} has others than its tensor or pipeline group")
    for step, expected in enumerate(course.samples):
        of_step = [by_rank[rank][step] for rank in sorted(by_rank)]
        found = [row for micro_batches in zip(*of_step, strict=True) for rows in micro_batches for row in rows]
        if found != expected:
            return Finding(run, what, ok=False, first=f"step {step + 1}")
    return Finding(run, what, ok=True)


def _steps(run: str, name: str, expected: Sequence[float], found: Sequence[Sequence[float]], allowed: float) -> Finding:
    """One number a step, on every process."""
    differences = [max(_relative(values[step], value) for values in found) for step, value in enumerate(expected)]
    first = next((f"step {step + 1}" for step, one in enumerate(differences) if not one <= allowed), "")
    return Finding(run, f"{name} of {len(expected)} steps", not first, _largest(differences), allowed, first)


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if expected else abs(found)


def _largest(differences: Sequence[float]) -> float:
    """The largest, not a number where any of them is none."""
    return math.nan if any(math.isnan(one) for one in differences) else max(differences, default=0.0)


def _with_checkpoint(
    run: str, store: CheckpointStore, step: int, work: Callable[[SliceReader], list[Finding]]
) -> list[Finding]:
    """What `work` finds; where the checkpoint does not hold all tensors, that."""
    try:
        step_dir = store.step_dir(step)
        with SliceReader(rank_files(step_dir, read_manifest(step_dir))) as reader:
            return work(reader)
    except CheckpointError as error:
        return [Finding(run, f"tensors after {step} steps", ok=False, first=str(error))]


def _initial(run: str, course: Course, reader: SliceReader) -> Finding:
    reader.check_model({name: tuple(value.shape) for name, value in course.initial.items()})
    differing = (name for name, value in course.initial.items() if not torch.equal(reader.read_whole(name), value))
    first = next(differing, "")
    return Finding(run, f"initial weights, {len(course.initial)} tensors", not first, first=first)


def _tensors(run: str, course: Course, reader: SliceReader, optim: OptimSection) -> Iterator[Finding]:
    """Both moments, then the weights."""
    reader.check_model({name: tuple(value.shape) for name, value in course.initial.items()})
    for kind in MOMENTS:
        largest = max(float(state[kind].abs().max()) for state in course.first.values())
        differences = {
            name: _tensor_difference(reader.read_whole(name, kind), state[kind], SMALLEST_SCALE * largest)
            for name, state in course.first.items()
        }
        yield _of_tensors(run, TITLES[kind], differences)
    differences = {
        name: _weight_difference(name, reader, state, course.first_lr, optim) for name, state in course.first.items()
    }
    yield _of_tensors(run, "weights after step 1", differences)


def _of_tensors(run: str, title: str, differences: dict[str, float]) -> Finding:
    first = next((name for name, one in differences.items() if not one <= TENSORS_ALLOWED), "")
    what = f"{title}, {len(differences)} tensors"
    return Finding(run, what, not first, _largest(list(differences.values())), TENSORS_ALLOWED, first)


def _tensor_difference(found: Tensor, expected: Tensor, scale: float) -> float:
    """The largest difference of two elements, relative to the largest element."""
    size = max(float(expected.abs().max()), scale)
    return float((found - expected).abs().max()) / size if size else float(found.abs().max())


def _weight_difference(
    name: str, reader: SliceReader, state: dict[str, Tensor], lr: float, optim: OptimSection
) -> float:
    """As for moments, less what the difference of the moments explains.

    Adam's first update is the rate times the gradient's sign, whatever its size: where a gradient is nothing but
    rounding, two right programs may move a weight in opposite directions. So the difference of both updates that
    follow from the moments is taken off; the moments themselves are compared before.
    """
    exp_avg, exp_avg_sq = (reader.read_whole(name, kind) for kind in MOMENTS)
    theirs = _first_update(exp_avg, exp_avg_sq, optim)
    ours = _first_update(state["exp_avg"], state["exp_avg_sq"], optim)
    unexplained = (reader.read_whole(name) + lr * theirs) - (state[WEIGHT] + lr * ours)
    return float(unexplained.abs().max()) / max(float(state[WEIGHT].abs().max()), 1e-8)


def _first_update(exp_avg: Tensor, exp_avg_sq: Tensor, optim: OptimSection) -> Tensor:
    """Source: Kingma & Ba 2015, algorithm 1, at t = 1."""
    beta1, beta2 = optim.betas
    return (exp_avg / (1 - beta1)) / ((exp_avg_sq / (1 - beta2)).sqrt() + optim.eps)
