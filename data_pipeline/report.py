"""report.json -> report.html (one file, nothing to load) and report.md; and the state of a job on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from data_pipeline.dedup.clusters import REASON_EXACT, REASON_NEAR
from data_pipeline.stages import STAGES
from data_pipeline.summary import REPORT_FILE, warnings_of
from data_pipeline.tasks import STAGES_FOLDER, TaskRecord, read_record
from megagpt.atomic import write_file
from megagpt.errors import DataError

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"

Bars = list[tuple[str, int, float]]
"""Label, number, share of the largest number: one bar each."""


def write_report(out: Path) -> Path:
    """Write report.html and report.md of a finished job; returns the path of the former.

    Raises:
        DataError: the job has no report.json (it has not finished), or a damaged one.
    """
    report = read_report(out)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("data_pipeline", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda number: f"{number:,}"
    environment.filters["size"] = _size
    environment.filters["cell"] = _markdown_cell
    values = {
        "report": report,
        "warnings": warnings_of(report),
        "funnel": bars(dict(funnel(report))),
        "steps": [(label, left, source_funnel(report, label)) for label, left in funnel(report)],
        "rejected": bars(report["rejected"]),
        "failed_rules": bars(report["failed_rules"]),
        "languages": bars(dict(list(report["languages"].items())[:20])),
        "lengths": bars(dict(sorted(report["length_histogram"].items(), key=lambda item: int(item[0])))),
        "cluster_sizes": bars(report["dedup"]["cluster_sizes"]),
    }
    for template, file in (("report.html", HTML_FILE), ("report.md", MARKDOWN_FILE)):
        write_file(out / file, environment.get_template(template).render(values).encode())
    return out / HTML_FILE


def read_report(out: Path) -> dict[str, Any]:
    """The content of report.json.

    Raises:
        DataError: it is missing or damaged.
    """
    path = out / REPORT_FILE
    try:
        report: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; a data job writes it when it has finished (`megagpt data run`)"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: damaged: {error}; run `megagpt data run` again") from None
    return report


def funnel(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Documents left after each step, from all records down to what was packed."""
    left = sum(source["records"] for source in report["sources"].values())
    steps = [("records", left)]
    losses = {**report["rejected"], **{reason: report["dedup"][reason] for reason in (REASON_EXACT, REASON_NEAR)}}
    for reason, number in losses.items():
        left -= number
        steps.append((f"after {reason}", left))
    return steps


def source_funnel(report: Mapping[str, Any], label: str) -> dict[str, int]:
    """For one step of the funnel, the documents that each source loses there (all its records for the first)."""
    reason = label.removeprefix("after ")
    lost = {}
    for name, source in report["sources"].items():
        if label == "records":
            lost[name] = source["records"]
        else:
            lost[name] = source[reason] if reason in (REASON_EXACT, REASON_NEAR) else source["rejected"].get(reason, 0)
    return lost


def bars(numbers: Mapping[str, int]) -> Bars:
    """A bar for each number, 100 % being the largest."""
    largest = max(numbers.values(), default=0) or 1
    return [(label, number, round(100 * number / largest, 1)) for label, number in numbers.items()]


def status(out: Path) -> str:
    """The state of a job, finished or not, on one page.

    Raises:
        DataError: there is no job in this folder.
    """
    stages_folder = out / STAGES_FOLDER
    if not stages_folder.is_dir():
        raise DataError(
            f"{out}: no data job here; `megagpt data run CONFIG` makes one in the folder `out` of its config"
        )
    records = {stage: _records_of(stages_folder / stage) for stage in STAGES}
    expected = {**dict.fromkeys(("map", "signatures", "encode"), _planned_shards(out))}
    lines = [str(out)]
    for stage, done in records.items():
        n_tasks = expected.get(stage)
        of = f" of {n_tasks}" if n_tasks is not None and n_tasks >= len(done) else ""
        counts = [record.counts for record in done]
        n_in, n_out = sum(c.documents_in for c in counts), sum(c.documents_out for c in counts)
        documents = f"{n_in:>12,} documents in {n_out:>12,} out" if n_in else ""
        lines.append(f"  {stage:<11} {len(done)}{of} task(s) done {documents}")
    lines.append("")
    if not (out / REPORT_FILE).is_file():
        return "\n".join([*lines, *_rejections(records["map"]), "not finished: run the same command again\n"])
    report = read_report(out)
    for split, values in report["splits"].items():
        lines.append(
            f"  {split:<11} {values['documents']:,} documents, {values['tokens']:,} tokens, "
            f"{values['text_bytes']:,} bytes of text"
        )
    lines += [f"  warning: {warning}" for warning in warnings_of(report)]
    return "\n".join([*lines, f"finished; report: {out / HTML_FILE}\n"])


def _records_of(folder: Path) -> list[TaskRecord]:
    found = (read_record(path) for path in sorted(folder.glob("*.json")))
    return [record for record in found if record is not None]


def _planned_shards(out: Path) -> int | None:
    """The number of shards of the last run; None before it got that far."""
    try:
        n_shards: int = json.loads((out / "plan.json").read_bytes())["shards"]
    except FileNotFoundError:
        return None
    return n_shards


def _rejections(maps: list[TaskRecord]) -> list[str]:
    rejected: dict[str, int] = {}
    for record in maps:
        for reason, number in record.counts.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + number
    ordered = sorted(rejected.items(), key=lambda item: -item[1])
    return [f"  rejected    {number:>12,} {reason}" for reason, number in ordered]


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:,.0f} {unit}" if unit == "bytes" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


def _markdown_cell(text: str) -> str:
    """Text from the web inside a table: no line break, bar or tag of it may act as Markdown or HTML."""
    flat = " ".join(text.split())
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "\\`"), ("[", "\\[")):
        flat = flat.replace(character, escaped)
    return flat
