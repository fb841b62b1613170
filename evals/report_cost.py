"""What the run cost, and on what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evals import report_numbers as numbers
from evals.report_inputs import RunFolder
from evals.report_published import run_parameters
from megagpt.model.flops import flops_per_token


def cost(run: RunFolder) -> list[tuple[str, str, str]]:
    """(what, number, how it was made) of training and evaluation."""
    found = []
    last = run.train_rows[-1] if run.train_rows else {}
    tokens = last.get("tokens")
    unit, hours = process_hours(run)
    if run.train_rows:
        found.append(
            (unit, f"{hours:,.2f}", "processes x time of all steps that count; without restarts and evaluation")
        )
    if tokens is not None:
        model = run.config.model
        flops = flops_per_token(model, model.max_seq_len) * tokens
        found.append(("tokens trained on", numbers.count(tokens), f"{tokens / run_parameters(run):,.1f} a parameter"))
        note = "forward and backward, 6N of multiplied parameters and attention counted in full, a token"
        found.append(("training FLOPs", f"{flops:.3g}", note))
        found.append(
            ("6ND", f"{6 * run_parameters(run) * tokens:.3g}", "by which compute is compared with other models")
        )
    results = [result for evals in run.evals for result in evals.results if result.status == "ok"]
    if results:
        seconds = sum(result.seconds for result in results)
        documents = sum(result.n for result in results)
        found.append(("evaluation", numbers.duration(seconds), f"{documents:,} documents in {len(results)} results"))
    validation = sum(row.get("val_seconds") or 0.0 for row in run.eval_rows)
    if validation:
        found.append(("validation during training", numbers.duration(validation), f"{len(run.eval_rows)} times"))
    if run.benchmark_rows:
        scored = sum(row["tasks_seconds"] or 0.0 for row in run.benchmark_rows)
        found.append(("benchmarks during training", numbers.duration(scored), f"{len(run.benchmark_rows)} times"))
    return found


def process_hours(run: RunFolder) -> tuple[str, float]:
    """(unit, hours): each step's time, times the processes that the run had when it was made.

    A process has one accelerator where there are any; a run on a CPU build of torch counts processes.
    """
    torch_version = str((run.versions or {}).get("torch", ""))
    unit = "CPU process-hours" if torch_version.endswith("+cpu") else "device-hours"
    sizes = list(_world_sizes(run.events, run.plan))
    seconds = 0.0
    for row in run.train_rows:
        size = next((size for step, size in reversed(sizes) if step < row["step"]), sizes[0][1])
        seconds += size * (row.get("step_seconds") or 0.0)
    return unit, seconds / 3600


def _world_sizes(events: Iterable[Mapping[str, Any]], plan: Mapping[str, Any] | None) -> Iterable[tuple[int, int]]:
    """(step after which, processes), oldest first."""
    yield -1, int((plan or {}).get("world_size", 1))
    for event in events:
        if event.get("event") in ("started", "resumed") and isinstance(event.get("world_size"), int):
            yield event["step"], event["world_size"]
