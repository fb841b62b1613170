"""What the run was trained on, and the way back from a score to the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals import report_charts as charts
from evals.report_inputs import DataTrail, RunFolder


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
        "thresholds": flat(report.get("thresholds", {})),
    }


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


def funnel_chart(found: Mapping[str, Any]) -> str:
    """Documents left after each step; empty where the steps are not known."""
    if not found["steps"]:
        return ""
    return charts.bar_chart(f"Documents left: {found['prefix']}", [(label, left) for label, left, _ in found["steps"]])


def flat(values: Mapping[str, Any], at: str = "") -> list[tuple[str, str]]:
    """Nested values as (dotted key, text)."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{at}{key}.")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            rows.append((f"{at}{key}", str(value)))
        else:
            rows.append((f"{at}{key}", f"{value:,}" if isinstance(value, int) else f"{value:.6g}"))
    return rows
