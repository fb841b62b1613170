"""Layouts as data, the runs that measure them, and what the plain loop gives for the same run."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import KINDS, SliceReader
from megagpt.config.schema import TrainingRun
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from tests.distributed.jobs import Job, Measured, read_measured, run_jobs
from tests.distributed.processes import start
from tests.reference_loop import Curve, reference_run
from tests.tiny import run_config

STEPS = 20
BATCH = 8

# Heads of an even width, and as many as the largest tensor group has processes.
SHALLOW = {
    "gpt2": ("gpt2", "model.n_head=4", "model.d_model=32"),
    "llama": ("llama",),  # 4 query heads, 2 key and value heads
    "mqa": ("llama", "model.n_kv_head=1", "model.d_model=32", "model.qk_norm=true", "model.tied_head=true"),
}
# As many blocks as there are stages. The loss falls by a tenth; at 1e-2 rounding grows tenfold every six steps.
DEEP = {f"deep_{name}": (*words, "model.n_layer=4", "optim.lr=3e-3") for name, words in SHALLOW.items()}
MODELS = SHALLOW | DEEP


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
    more: tuple[str, ...] = ()
    """Further words of the configuration, the last ones."""
    label: str = ""
    """What stands for `more` in the name, where its values should not."""

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
            self.label or "-".join(word.rpartition(".")[2] for word in self.more),
        ]
        return "-".join(part for part in parts if part)

    def words(self) -> list[str]:
        """The configuration beside `tests.tiny`."""
        return [
            *MODELS.get(self.family, ())[1:],
            f"train.max_steps={STEPS}",
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
            *self.more,
        ]


Configure = Callable[..., TrainingRun]
"""Called with a layout and further words."""
Jobs = list[tuple[Layout, Job]]


def by_name(layout: Layout) -> str:
    return layout.name


def configuration(layout: Layout, tokens: Path, *words: str) -> TrainingRun:
    """Of a layout whose family is one of `MODELS`."""
    family = MODELS[layout.family][0]
    return run_config(tokens.parent / "unused", tokens, *layout.words(), *words, family=family)


class References(dict[str, Curve]):
    """Family -> what the plain loop shows in `STEPS` steps; computed when it is asked for."""

    def __init__(self, configure: Configure) -> None:
        super().__init__()
        self._configure = configure

    def __missing__(self, family: str) -> Curve:
        self[family] = reference_run(self._configure(Layout(family=family)), STEPS)
        return self[family]


def measure(jobs: Jobs, where: Path, seconds: float = 3000) -> dict[str, Measured]:
    """Run the jobs, a group of processes for all layouts of the same degrees, one group after the other.

    Args:
        jobs: the first of some degrees says when their group's turn is.
        where: folder for logs.
        seconds: that each group may take.
    """
    groups = defaultdict(list)
    for layout, job in jobs:
        groups[layout.degrees].append(job)
    found: dict[str, Measured] = {}
    for degrees, members in groups.items():
        folder = Path(tempfile.mkdtemp(prefix=f"group-{'x'.join(map(str, degrees))}-", dir=where))
        out = folder / "measured.json"
        start(run_jobs, torch.Size(degrees).numel(), members, out, log=folder / "log").finish(seconds)
        found |= read_measured(out)
    return found


def training_jobs(layouts: Iterable[Layout], configure: Configure, first: Path | None = None) -> Jobs:
    """Each layout for `STEPS` steps; it saves after the first one into a folder of its name under `first`."""
    return [
        (one, Job(one.name, configure(one), STEPS, save_first=None if first is None else first / one.name))
        for one in layouts
    ]


def swapped_jobs(layout: Layout, configure: Configure, swapped: Iterable[int]) -> Jobs:
    """A first step as it is, and with one micro-batch replaced, for `check_swapped`."""
    config = configure(layout)
    return [(layout, Job(f"swapped-{index}", config, 1, swap_micro_batch=index)) for index in (None, *swapped)]


def relative(found: list[float], expected: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(f - e) / abs(e) for f, e in zip(found, expected, strict=True))


def check(found: Measured, expected: Curve, steps: int = STEPS) -> None:
    """Loss and gradient norm of every step, of the first `steps`."""
    assert relative(found.losses, expected.losses[:steps]) < 1e-5
    assert relative(found.grad_norms, expected.grad_norms[:steps]) < 1e-5


def check_near(found: Measured, expected: Curve) -> None:
    """Low precision gives other losses than fp32, and not much other ones."""
    assert 1e-5 < relative(found.losses, expected.losses) < 2e-3


def check_swapped(measured: dict[str, Measured], swapped: Iterable[int]) -> None:
    """Replacing any micro-batch changes the first step by a hundred times the tolerance of `check`."""
    whole = measured["swapped-None"]
    for index in swapped:
        found = measured[f"swapped-{index}"]
        assert relative(found.losses + found.grad_norms, whole.losses + whole.grad_norms) > 1e-3


def check_clips_and_learns(reference: Curve) -> None:
    """So that equality with it means something."""
    assert sum(norm > 0.5 for norm in reference.grad_norms) >= STEPS - 5
    assert reference.losses[-1] < reference.losses[0] - 0.5


def logical_tensors(folder: Path, step: int, kinds: tuple[str, ...] | None = KINDS) -> dict[str, torch.Tensor]:
    """Every value of a checkpoint as if one process had written it: `NAME|KIND` -> tensor.

    Args:
        folder: of the store.
        step: of the checkpoint.
        kinds: that every tensor must have; None for those that each one has.
    """
    step_dir = CheckpointStore(folder).step_dir(step)
    with SliceReader(rank_files(step_dir, read_manifest(step_dir))) as reader:
        kept = [(name, kind) for name in reader.shapes for kind in kinds or reader.kinds(name)]
        return {f"{name}|{kind}": reader.read_whole(name, kind) for name, kind in kept}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same values bit for bit."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def initial_weights(config: TrainingRun) -> dict[str, torch.Tensor]:
    """Of one process."""
    model = build_model(config.model)
    init_weights(model, config.run.seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_first_gradients(folder: Path, expected: dict[str, torch.Tensor], beta1: float) -> None:
    """Adam's first moment after one step is (1 - beta1) of the clipped gradient."""
    tensors = logical_tensors(folder, 1)
    assert {name.partition("|")[0] for name in tensors} == expected.keys()
    for name, gradient in expected.items():
        found = tensors[f"{name}|exp_avg"] / (1 - beta1)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item() + 1e-9, msg=name)
