"""A verdict for a person."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megagpt.config.schema import TrainingRun
from megagpt.verify.compare import Finding
from megagpt.verify.run import Verdict


def show(verdict: Verdict, console: Console) -> None:
    """Print what was run, the table, and each thing that differs as a line of its own."""
    small = verdict.small
    console.print(_layout(small.config, small.world_size), highlight=False, soft_wrap=True)
    if small.changes:
        console.print(f"made smaller: {', '.join(small.changes)}", highlight=False, markup=False, soft_wrap=True)
    table = Table("", "Precision", "Compared with plain PyTorch", "Largest difference", "Allowed", "First that differs")
    for finding in verdict.findings:
        mark = Text("✓", "green") if finding.ok else Text("✗", "bold red")
        table.add_row(mark, finding.run, finding.what, *map(Text, (*_numbers(finding), finding.first)))
    console.print(table)
    for line in verdict.log:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if small.not_run is not None:
        console.print(f"not run: {small.not_run}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    _show_result(verdict, console)


def _show_result(verdict: Verdict, console: Console) -> None:
    if verdict.ok:
        text = f"all agrees: this layout trains as one process does ({verdict.seconds:.0f} s)"
        console.print(text, style="green", highlight=False)
        return
    for finding in verdict.findings:
        if not finding.ok:
            text = f"error: {finding.run}: {finding.what}: first: {finding.first}"
            console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)


def _layout(config: TrainingRun, world_size: int) -> str:
    parallel = config.parallel
    model_parallel = parallel.pipeline * parallel.sequence * parallel.tensor
    axes = {
        "pipeline": parallel.pipeline,
        "data": world_size // model_parallel,
        "sequence": parallel.sequence,
        "tensor": parallel.tensor,
    }
    product = " x ".join(f"{axis} {size}" for axis, size in axes.items())
    more = [f"ZeRO-{parallel.zero_stage}", *(["tensor_sequence"] * parallel.tensor_sequence)]
    if parallel.pipeline > 1:
        more.append(parallel.pipeline_schedule)
    return f"{config.model.family}, {world_size} processes = {product}, {', '.join(more)}"


def _numbers(finding: Finding) -> tuple[str, str]:
    if finding.difference is None or finding.allowed is None:
        return ("equal" if finding.ok else "", "none")
    difference = "not a number" if math.isnan(finding.difference) else f"{finding.difference:.1e}"
    return difference, f"{finding.allowed:.0e}"
