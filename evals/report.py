"""runs/NAME -> report.html (one file that loads nothing) and report.md with the same numbers."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from evals import report_charts as charts
from evals import report_numbers as numbers
from evals.report_inputs import HELDOUT_TASK, DataTrail, RunFolder, StepEvals, read_run_folder
from evals.results import Metric, TaskResult
from megagpt.atomic import write_file
from megagpt.train.events import goodput

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"


def write_run_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.html and report.md of a run, finished or not, from what its folder holds.

    Equal inputs give equal files but for the line that says when they were made.

    Raises:
        EvalError: `run_dir` is no run's folder, or one of its files is damaged: names the file and the line.
        ConfigError: its config.yaml does not fit this version.
        DataError: the manifest of its tokens is damaged.
    """
    run = read_run_folder(run_dir)
    funnels = [funnel(trail) for trail in run.data]
    view = {
        "name": run.run_dir.resolve().name,
        "made_at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "headline": headline(run),
        "missing": run.missing,
        "scores": [row for evals in run.evals for result in evals.results for row in score_rows(evals.step, result)],
        "funnels": funnels,
        "samples": [
            (evals.step, [_readable(row) for row in evals.generations]) for evals in run.evals[-1:] if evals.generations
        ],
        "history": history(run),
        "time": time_spent(run),
        "trail": trail_rows(run),
        "plan": _flat(run.plan or {}),
        "versions": _flat(run.versions or {}),
        "config": run.config_text,
    }
    environment = _environment()
    targets = (run_dir / HTML_FILE, run_dir / MARKDOWN_FILE)
    for target in targets:
        template = environment.get_template(f"{target.name}.j2")
        drawn = _charts(run, funnels) if target.suffix == ".html" else {}
        write_file(target, template.render(**view, charts=drawn).encode())
    return targets


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


def _origin(result: TaskResult) -> str:
    """Where the documents came from, short: a local folder by its last two names, as on the hub."""
    known = Path(str(result.data.get("path_or_id") or ""))
    return " ".join([str(result.data.get("origin") or ""), "/".join(known.parts[-2:])]).strip()


def score_rows(step: int, result: TaskResult) -> list[dict[str, Any]]:
    """One row a metric; one row with the reason for a task that could not be run."""
    limit = result.settings.get("limit")
    common = {
        "step": step,
        "task": result.task,
        "reason": result.reason,
        "n": f"{result.n:,}" if result.n == result.n_total else f"{result.n:,} of {result.n_total:,}",
        "shots": "0" if result.n_shots == 0 else str(result.n_shots or "task's own"),
        "limit": "none" if limit is None else f"{limit:,}",
        "truncated": f"{result.truncated:,}",
        "version": result.task_version or "",
        "origin": _origin(result),
        "seconds": numbers.duration(result.seconds),
        "hash": str(result.checkpoint.get("hash", "")),
    }
    if result.status != "ok":
        return [{**common, "metric": None}]
    return [
        {
            **common,
            "metric": name,
            "value": numbers.score(metric.value),
            "interval": numbers.interval(metric.ci95),
            "stderr": "none" if metric.stderr is None else numbers.score(metric.stderr),
            "chance": numbers.score(result.chance) if _has_chance(name, result) else "none",
            "better": "higher" if metric.higher_is_better else "lower",
        }
        for name, metric in result.metrics.items()
    ]


def _has_chance(metric: str, result: TaskResult) -> bool:
    return result.chance is not None and metric.startswith("acc")


def funnel(trail: DataTrail) -> dict[str, Any]:
    """Documents left after each filter, duplicates removed, tokens by source and split; what was not found is None."""
    report = trail.report or {}
    sources: Mapping[str, Any] = report.get("sources", {})
    left = sum(source["records"] for source in sources.values())
    steps = [("records read", left, 0)] if sources else []
    for by_reason in report.get("lost", {}).values():  # stages in their order
        for reason, number in by_reason.items():
            left -= number
            steps.append((f"after {reason}", left, number))
    return {
        "prefix": str(trail.prefix),
        "known": trail.report is not None,
        "steps": steps,
        "languages": list(report.get("languages", {}).items()),
        "splits": [(name, split) for name, split in report.get("splits", {}).items()],
        "sources": list(sources.items()),
        "damage": report.get("damage", {}).get("count", 0),
        "thresholds": _flat(report.get("thresholds", {})),
    }


def time_spent(run: RunFolder) -> list[tuple[str, str, str]]:
    """(for what, how long, share of all) of the run's time, from its first start to its last sign of life."""
    found = goodput(run.events, [*run.train_rows, *run.eval_rows])
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


def trail_rows(run: RunFolder) -> list[tuple[str, str]]:
    """From scores back to the text: weights, configuration, token files, preparation."""
    rows = []
    for evals in run.evals:
        for weights in sorted({str(result.checkpoint.get("hash", "")) for result in evals.results}):
            there = run.checkpoints.get(evals.step)
            state = "still there" if there == weights else "no longer there" if there is None else f"now {there}"
            rows.append((f"scores of step {evals.step:,}", f"weights {weights}; this checkpoint is {state}"))
    rows += [(f"checkpoint step {step:,}", f"weights {found}") for step, found in run.checkpoints.items()]
    if run.plan and run.plan.get("data_manifest_hash"):
        rows.append(("training started from", f"data manifest {run.plan['data_manifest_hash']}"))
    for trail in run.data:
        share = "" if trail.weight is None else f", weight {trail.weight:g}"
        counts = f", {trail.entry['tokens']:,} tokens in {trail.entry['documents']:,} documents" if trail.entry else ""
        rows.append(("token file", f"{trail.prefix}{share}{counts}"))
        rows.append(("its manifest", trail.manifest_hash or "not found"))
        rows.append(("made by the data job", trail.job_hash or "not found"))
    return rows


def _charts(run: RunFolder, funnels: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "training": _training_charts(run),
        "scores": _score_charts(run.evals),
        "funnels": [
            charts.bar_chart(f"Documents left: {found['prefix']}", [(label, left) for label, left, _ in found["steps"]])
            if found["steps"]
            else ""
            for found in funnels
        ],
    }


def _training_charts(run: RunFolder) -> list[str]:
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


def _score_charts(evals: tuple[StepEvals, ...]) -> list[str]:
    """Intervals at the newest step that has scores; and each score over steps where there are several."""
    drawn = []
    for step in [step for step in evals if step.results][-1:]:
        bars = [
            charts.Bar(
                f"{result.task} {name}", metric.value, metric.ci95, result.chance if _has_chance(name, result) else None
            )
            for result in step.results
            for name, metric in result.metrics.items()
            if _is_share(metric)
        ]
        if bars:
            drawn.append(charts.score_chart(f"Scores at step {step.step:,}", bars))
    curves: dict[str, list[tuple[int, float]]] = {}
    for step in evals:
        for result in step.results:
            for name, metric in result.metrics.items():
                if _is_share(metric):
                    curves.setdefault(f"{result.task} {name}", []).append((step.step, metric.value))
    colors = charts.PALETTE
    lines = [
        charts.Line(label, [x for x, _ in points], [y for _, y in points], colors[index % len(colors)], points=True)
        for index, (label, points) in enumerate(curves.items())
        if len(points) > 1
    ]
    if lines:
        drawn.append(charts.line_chart("Scores by step", lines, y_label="score", width=8.2))
    return drawn


def _is_share(metric: Metric) -> bool:
    """A score from 0 to 1; a loss has no place on its axis. A stored null stands for NaN."""
    value: float | None = metric.value
    return value is not None and metric.higher_is_better and 0 <= value <= 1


def _readable(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A weak model writes screens of empty lines: they are counted instead of shown."""
    text = re.sub(r"\n{4,}", lambda run: f"\n[{len(run[0]):,} line breaks]\n", sample["text"])
    return {**sample, "text": text}


def _flat(values: Mapping[str, Any], at: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted key, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{at}{key}.")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            rows.append((f"{at}{key}", str(value)))
        else:
            rows.append((f"{at}{key}", f"{value:,}" if isinstance(value, int) else f"{value:.6g}"))
    return rows


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evals", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["full"] = lambda number: f"{number:,}"
    environment.filters["cell"] = numbers.cell
    environment.filters["fence"] = numbers.fence
    return environment
