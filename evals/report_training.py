"""How the run went: its first numbers, its curves, its history, where its time went."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from evals import report_charts as charts
from evals import report_numbers as numbers
from evals.report_inputs import HELDOUT_TASK, RunFolder, StepEvals
from megagpt.train.events import goodput


def headline(run: RunFolder) -> list[tuple[str, str, str]]:
    """(what, number, how it was made) of the numbers that a reader wants first."""
    rows, found = run.train_rows, []
    if rows:
        found.append(("training loss", numbers.score(rows[-1]["loss"]), f"nats a token, step {rows[-1]['step']:,}"))
    losses = [(row["step"], row["val_loss"]) for row in run.eval_rows if row["val_loss"] is not None]
    if losses:
        (first_step, first), (last_step, last) = losses[0], losses[-1]
        fall = f", {numbers.percent(1 - last / first)} lower" if len(losses) > 1 and first > 0 else ""
        note = f"from {numbers.score(first)} at step {first_step:,}{fall}"
        found.append((f"validation loss, step {last_step:,}", numbers.score(last), note))
    found += _bits_per_byte(run.evals)
    if rows:
        found.append(("tokens", numbers.count(rows[-1].get("tokens")), f"target tokens in {rows[-1]['step']:,} steps"))
        seconds = [row["step_seconds"] for row in rows if row.get("step_seconds") is not None]
        found.append(("training time", numbers.duration(sum(seconds)), "all steps, without evaluation and saving"))
        found += _median(rows, "tokens_per_second", "tokens a second", numbers.count, "median over steps")
        found += _median(rows, "mfu", "MFU", numbers.percent, "median; model FLOPs, attention counted in full")
    if run.plan and "parameters" in run.plan:
        found.append(("parameters", numbers.count(run.plan["parameters"]), run.config.model.family))
    return found


def _median(
    rows: Iterable[Mapping[str, Any]], key: str, label: str, shown: Callable[[float], str], note: str
) -> list[tuple[str, str, str]]:
    values = [row[key] for row in rows if row.get(key) is not None]
    return [(label, shown(statistics.median(values)), note)] if values else []


def _bits_per_byte(evals: Iterable[StepEvals]) -> list[tuple[str, str, str]]:
    measured = [
        (step.step, result, result.metrics["bits_per_byte"])
        for step in evals
        for result in step.results
        if result.task == HELDOUT_TASK and "bits_per_byte" in result.metrics
    ]
    if not measured:
        return []
    step, result, metric = measured[-1]
    note = f"held-out text, step {step:,}, n {result.n:,}; 95 % interval {numbers.interval(metric.ci95)}"
    return [("bits per byte", numbers.score(metric.value), note)]


def time_spent(run: RunFolder) -> list[tuple[str, str, str]]:
    """(for what, how long, share of all) of the run's time, from its first start to its last sign of life."""
    found = goodput(run.events, [*run.train_rows, *run.eval_rows, *run.benchmark_rows])
    if found is None:
        return []
    spent = [("steps that count (goodput)", found.useful), *found.lost.items(), ("all", found.wall)]
    return [(name, numbers.duration(seconds), numbers.percent(seconds / found.wall)) for name, seconds in spent]


def history(run: RunFolder) -> list[str]:
    """Starts, restarts, saves and skipped steps, oldest first."""
    lines = []
    alive = False
    saves = [event for event in run.events if event.get("event") == "saved"]
    for event in run.events:
        name = str(event.get("event", "event"))
        if name == "saved":  # there are many; one line for all stands below
            continue
        killed = name in ("started", "resumed") and alive
        details = ", ".join(f"{key} {event[key]}" for key in event if key not in ("time", "event", "step"))
        note = "; the process before it ended without a word (killed)" if killed else ""
        told = f": {details}" if details else ""
        lines.append(f"{event.get('time', '')} {name} at step {event['step']:,}{told}{note}")
        if name in ("started", "resumed", "stopped", "finished", "failed", "diverged", "hung"):
            alive = name in ("started", "resumed")
    if saves:
        waited = statistics.median(float(event["seconds"]) for event in saves)
        lines.append(f"checkpoints saved: {len(saves)}; training waited {numbers.duration(waited)} (median)")
    skipped = [row["step"] for row in run.train_rows if row.get("skipped")]
    some = ", ".join(f"{step:,}" for step in skipped[:20]) + (" ..." if len(skipped) > 20 else "")
    lines.append(f"skipped steps: {len(skipped)}" + (f" ({some})" if skipped else ""))
    return lines


def training_charts(run: RunFolder) -> list[str]:
    """Loss, learning rate, gradient norm, throughput, utilisation over steps."""
    curves = [
        _line(run.train_rows, "loss", "training", charts.BLUE),
        _line(run.eval_rows, "val_loss", "validation", charts.VERMILLION, points=True),
    ]
    losses = [line for line in curves if line.x]
    later = [line for line in (_from_step_one(line) for line in losses) if line.x]
    drawn = []
    if losses:
        drawn.append(charts.line_chart("Loss", losses, y_label="nats a token"))
    if later:
        drawn.append(charts.line_chart("Loss, logarithmic steps", later, y_label="nats a token", x_scale="log"))
    for key, title, unit in (
        ("lr", "Learning rate", ""),
        ("grad_norm", "Gradient norm before clipping", "norm"),
        ("tokens_per_second", "Throughput", "tokens a second"),
        ("mfu", "Model FLOP utilisation", "fraction of peak"),
    ):
        line = _line(run.train_rows, key, key, charts.BLUE)
        if line.x:
            is_log = key == "grad_norm" and min(line.y) > 0
            drawn.append(
                charts.line_chart(
                    title, [line], y_label=unit, y_scale="log" if is_log else "linear", from_zero=not is_log
                )
            )
    return drawn


def _line(rows: Iterable[Mapping[str, Any]], key: str, label: str, color: str, *, points: bool = False) -> charts.Line:
    known = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return charts.Line(label, [step for step, _ in known], [value for _, value in known], color, points)


def _from_step_one(line: charts.Line) -> charts.Line:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if x >= 1]
    return charts.Line(line.label, [x for x, _ in known], [y for _, y in known], line.color, line.points)


def readable_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A weak model writes screens of empty lines: they are counted instead of shown."""
    text = re.sub(r"\n{4,}", lambda run: f"\n[{len(run[0]):,} line breaks]\n", sample["text"])
    return {**sample, "text": text}
