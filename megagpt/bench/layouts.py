"""`megagpt bench layouts`: the peak memory of each process under each layout, counted, beside what the formulas say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megagpt.bench.memory_process import measure_layout
from megagpt.bench.processes import run_group
from megagpt.config.load import load_arguments
from megagpt.config.schema import TrainingRun
from megagpt.errors import ConfigError
from megagpt.parallel.memory import stage_memory
from megagpt.parallel.plan import plan_batches

MODELS = {
    "gpt2": {"family": "gpt2", "n_layer": 6, "n_head": 4, "d_model": 160},
    "llama": {"family": "llama", "n_layer": 6, "n_head": 4, "n_kv_head": 2, "d_model": 160, "d_ff": 432},
}
"""Small enough for seconds on a CPU; weights, activations and logits all count, and nothing small does."""

_COMMON = (
    "model.vocab_size=2048",
    "model.max_seq_len=384",
    "optim.lr=1e-4",
    "train.max_steps=2",
    "train.micro_batch_size=1",
    "train.global_batch_size=4",
    "train.dtype=fp32",
)
_BUCKET = "parallel.extra.zero_optimization.reduce_bucket_size=100000"
_ZERO3 = (
    "parallel.zero_stage=3",
    _BUCKET,
    "parallel.extra.zero_optimization.stage3_prefetch_bucket_size=100000",
    "parallel.extra.zero_optimization.stage3_max_live_parameters=100000",
    "parallel.extra.zero_optimization.stage3_max_reuse_distance=0",
    "parallel.extra.zero_optimization.stage3_param_persistence_threshold=1000",
)
"""DeepSpeed's own sizes are for large models: they alone would hold more than this model."""

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "zero0": (1, ("parallel.zero_stage=0",)),
    "zero1": (1, ()),
    "zero0-dp2": (2, ("parallel.zero_stage=0",)),
    "zero1-dp2": (2, ()),
    "zero2-dp2": (2, ("parallel.zero_stage=2", _BUCKET)),
    "zero3-dp2": (2, _ZERO3),
    "zero1-dp4": (4, ()),
    "zero2-dp4": (4, ("parallel.zero_stage=2", _BUCKET)),
    "zero3-dp4": (4, _ZERO3),
    "tensor2": (2, ("parallel.tensor=2",)),
    "tensor2-sequence": (2, ("parallel.tensor=2", "parallel.tensor_sequence=true")),
    "tensor2-zero3-dp2": (4, ("parallel.tensor=2", *_ZERO3)),
    "pipeline2": (2, ("parallel.pipeline=2",)),
    "pipeline2-tensor2": (4, ("parallel.pipeline=2", "parallel.tensor=2")),
    "pipeline2-dualpipev": (2, ("parallel.pipeline=2", "parallel.pipeline_schedule=dualpipev")),
    "selective": (1, ("train.recompute=selective",)),
    "full": (1, ("train.recompute=full",)),
    "full-pipeline2": (2, ("train.recompute=full", "parallel.pipeline=2")),
    "offload": (1, ("train.offload_activations=true",)),
    "offload-full": (1, ("train.recompute=full", "train.offload_activations=true")),
    "offload-zero3-dp2": (2, ("train.offload_activations=true", *_ZERO3)),
}
"""Name -> processes and the words of a configuration."""


@dataclass(frozen=True, slots=True)
class Row:
    """One process of one layout: the one that needs most."""

    layout: str
    processes: int
    rank: int
    stage: int
    optimizer_class: str
    measured_bytes: int
    formula_bytes: float
    measured_parts: dict[str, int]
    formula: dict[str, Any]
    measured_host_bytes: int
    ratios: list[float]
    """Measured / formula of every rank."""

    @property
    def ratio(self) -> float:
        """Measured / formula of this rank."""
        return self.measured_bytes / self.formula_bytes


def bench_layouts(family: str, names: Sequence[str], overrides: Sequence[str], console: Console) -> list[Row]:
    """Train two steps under each layout in real local processes, and show a table.

    Args:
        family: which of `MODELS`.
        names: of `LAYOUTS`; all of them where none is named.
        overrides: KEY=VALUE words of a training configuration, which count for every layout.
        console: for progress and the table.

    Raises:
        ConfigError: a layout that is not there, or a configuration that cannot run.
        MegaGPTError: a process failed.
    """
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        raise ConfigError(f"no layout is called {', '.join(unknown)}; there are {', '.join(LAYOUTS)}")
    rows = []
    with tempfile.TemporaryDirectory() as folder, console.status("starting") as status:
        configs = {name: _config(family, name, overrides, Path(folder)) for name in names or LAYOUTS}
        for name, config in list(configs.items()):  # before the first process starts
            try:
                plan_batches(config, LAYOUTS[name][0])
            except ConfigError as error:
                if names:
                    raise
                console.print(f"{name} is left out: {error}", highlight=False, markup=False)
                del configs[name]
        for row in _measured(configs, Path(folder), status):
            rows.append(row)
            console.print(_line(row), highlight=False, markup=False)
    console.print(_table(rows))
    return rows


def to_json(rows: Sequence[Row]) -> str:
    """All figures, as `--json` writes them."""
    return json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1) + "\n"


def _config(family: str, name: str, overrides: Sequence[str], folder: Path) -> TrainingRun:
    model = [f"model.{key}={value}" for key, value in MODELS[family].items()]
    unread = [f"run.dir={folder / 'run'}", f"data.train={folder / 'random'}"]
    return load_arguments(TrainingRun, [*unread, *model, *_COMMON, *LAYOUTS[name][1], *overrides])


def _measured(configs: dict[str, TrainingRun], folder: Path, status: Any) -> Iterator[Row]:
    for index, (name, config) in enumerate(configs.items()):
        processes = LAYOUTS[name][0]
        status.update(f"{name}: {processes} processes ({index + 1} of {len(configs)} layouts)")
        out = folder / f"{name}.json"
        run_group(measure_layout, processes, config, out, log=folder / f"{name}.log")
        estimates = stage_memory(config, plan_batches(config, processes), fused=False)
        found = json.loads(out.read_text())
        worst = max(found, key=lambda one: int(one["peak_bytes"]))
        estimate = estimates[worst["stage"]]
        yield Row(
            layout=name,
            processes=processes,
            rank=worst["rank"],
            stage=worst["stage"],
            optimizer_class=worst["optimizer_class"],
            measured_bytes=worst["peak_bytes"],
            formula_bytes=estimate.total_bytes,
            measured_parts=worst["parts"],
            formula=asdict(estimate),
            measured_host_bytes=worst["host_bytes"],
            ratios=[one["peak_bytes"] / estimates[one["stage"]].total_bytes for one in found],
        )


def _line(row: Row) -> str:
    return f"{row.layout}: {_mib(row.measured_bytes)} MiB measured, {_mib(row.formula_bytes)} MiB by the formula"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(
        title="Peak memory of the process that needs most, MiB of tensors",
    )
    table.add_column("layout")
    columns = ("processes", "rank", "measured", "formula", "ratio", "weights", "optimizer", "gradients", "buckets")
    for name in (*columns, "other", "on host", "peak in"):
        table.add_column(name, justify="right")
    for row in rows:
        phases = row.formula["phase_bytes"]
        parts = [_mib(row.measured_parts[kind]) for kind in (*columns[-4:], "other")]
        table.add_row(
            row.layout,
            str(row.processes),
            str(row.rank),
            _mib(row.measured_bytes),
            _mib(row.formula_bytes),
            f"{row.ratio:.3f}",
            *parts,
            _mib(row.measured_host_bytes),
            max(phases, key=phases.__getitem__),
        )
    return table


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"
