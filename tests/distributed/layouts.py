"""Layouts as data, the runs that measure them, and what the plain loop gives for the same run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import KINDS, SliceReader
from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.processes import start
from tests.reference_loop import Curve

STEPS = 20
BATCH = 8

# Heads of an even width, as many as the largest tensor group has processes; as many blocks as there are stages.
MODELS = {
    "gpt2": ("gpt2", "model.n_head=4", "model.d_model=32", "model.n_layer=4"),
    "llama": ("llama", "model.n_layer=4"),  # 4 query heads, 2 key and value heads
    "mqa": (
        "llama",
        "model.n_kv_head=1",
        "model.d_model=32",
        "model.qk_norm=true",
        "model.tied_head=true",
        "model.n_layer=4",
    ),
}


@dataclass(frozen=True, order=True, kw_only=True)
class Layout:
    """One way to lay a run over processes."""

    family: str = "gpt2"
    pipeline: int = 1
    data: int = 1
    sequence: int = 1
    tensor: int = 1
    zero: int = 1
    tensor_sequence: bool = False
    accumulation: int = 1
    schedule: str = "1f1b"
    dtype: str = "fp32"
    recompute: str = "none"
    offload: bool = False
    """Whether the optimizer's state is in host memory."""

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.sequence * self.tensor

    @property
    def degrees(self) -> tuple[int, ...]:
        """Layouts with the same ones can run in the same processes, one after the other."""
        return self.pipeline, self.data, self.sequence, self.tensor

    @property
    def name(self) -> str:
        parts = [
            self.family,
            f"pp{self.pipeline}" * (self.pipeline > 1),
            "v" * (self.schedule == "dualpipev"),
            f"dp{self.data}" * (self.data > 1),
            f"sp{self.sequence}" * (self.sequence > 1),
            f"tp{self.tensor}" * (self.tensor > 1),
            "ts" * self.tensor_sequence,
            f"zero{self.zero}",
            f"acc{self.accumulation}",
            self.dtype * (self.dtype != "fp32"),
            self.recompute * (self.recompute != "none"),
            "offload" * self.offload,
        ]
        return "-".join(part for part in parts if part)

    def words(self) -> list[str]:
        """The configuration beside `tests.tiny`."""
        return [
            *MODELS.get(self.family, ())[1:],
            f"train.max_steps={STEPS}",
            "optim.lr=3e-3",  # the loss falls by a tenth; at 1e-2 rounding grows tenfold every six steps
            f"train.global_batch_size={BATCH}",
            f"train.micro_batch_size={BATCH // self.data // self.accumulation}",
            f"train.dtype={self.dtype}",
            f"train.recompute={self.recompute}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.pipeline_schedule={self.schedule}",
            f"parallel.sequence={self.sequence}",
            f"parallel.tensor={self.tensor}",
            f"parallel.zero_stage={self.zero}",
            f"parallel.tensor_sequence={str(self.tensor_sequence).lower()}",
            f"parallel.offload_optimizer={'cpu' if self.offload else 'none'}",
        ]


def by_name(layout: Layout) -> str:
    return layout.name


def measure(jobs: Iterable[tuple[Layout, Job]], where: Path, seconds: float = 3000) -> dict[str, Measured]:
    """Run the jobs, a group of processes for all layouts of the same degrees, one group after the other."""
    groups = defaultdict(list)
    for layout, job in jobs:
        groups[layout.degrees].append(job)
    found: dict[str, Measured] = {}
    for degrees, members in groups.items():
        name = "x".join(map(str, degrees))
        world_size = torch.Size(degrees).numel()
        start(run_jobs, world_size, members, where / f"{name}.json", log=where / f"{name}.log").finish(seconds)
        found |= read_measured(where / f"{name}.json")
    return found


def relative(found: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def check(found: Measured, expected: Curve, tolerance: float = 1e-5) -> None:
    """Loss and gradient norm of every step."""
    assert relative(found.losses, expected.losses) < tolerance
    assert relative(found.grad_norms, expected.grad_norms) < tolerance


def logical_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every value of a checkpoint as if one process had written it: `NAME|KIND` -> tensor."""
    step_dir = CheckpointStore(folder).step_dir(step)
    with SliceReader(rank_files(step_dir, read_manifest(step_dir))) as reader:
        return {f"{name}|{kind}": reader.read_whole(name, kind) for name in reader.shapes for kind in KINDS}


def check_first_gradients(folder: Path, expected: dict[str, torch.Tensor], beta1: float) -> None:
    """Adam's first moment after one step is (1 - beta1) of the clipped gradient."""
    tensors = logical_tensors(folder, 1)
    assert {name.partition("|")[0] for name in tensors} == expected.keys()
    for name, gradient in expected.items():
        found = tensors[f"{name}|exp_avg"] / (1 - beta1)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9, msg=name)
