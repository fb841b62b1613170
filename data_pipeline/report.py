"""report.json -> report.html (one file, nothing to load) and report.md."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from data_pipeline.summary import REPORT_FILE, warnings_of
from megagpt.atomic import write_file
from megagpt.errors import DataError

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"

_LANGUAGES_SHOWN = 20

Bars = list[tuple[str, float, float]]
"""Label, number, share of the largest number: one bar each."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the funnel: what a filter, or a kind of duplicate, takes away."""

    name: str
    stage: str
    lost: int
    left: int
    share_left: float
    """Percent of all records."""
    rules: dict[str, int]
    """Reason -> documents, the largest first."""
    by_source: dict[str, int]


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
    environment.filters["percent"] = lambda share: f"{100 * share:.3g} %"
    values = {
        "report": report,
        "warnings": warnings_of(report),
        "n_records": sum(source["records"] for source in report["sources"].values()),
        "funnel": funnel(report),
        "failed_rules": bars(report["failed_rules"]),
        "languages": bars(dict(list(report["languages"].items())[:_LANGUAGES_SHOWN])),
        "characters": bars(_by_size(report["lengths"])),
        "lengths": bars(_by_size(report["length_histogram"])),
        "cluster_sizes": bars(report["dedup"]["cluster_sizes"]),
        "cost": bars({stage["stage"]: round(stage["cpu_seconds"], 1) for stage in report["stages"]}),
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


def funnel(report: Mapping[str, Any]) -> list[Step]:
    """What is left after each step, from all records down to what was packed; steps in the order of the pipeline.

    The rules of one filter are one step: `gopher_quality.min_words` belongs to `gopher_quality`.
    """
    n_records = left = sum(source["records"] for source in report["sources"].values())
    order = list(report["thresholds"])
    steps = []
    for stage, lost in report["lost"].items():
        groups: dict[str, dict[str, int]] = {}
        for reason, number in lost.items():
            groups.setdefault(reason.rpartition(".")[0] or reason, {})[reason] = number
        for name in sorted(groups, key=lambda group: order.index(group) if group in order else -1):
            rules = groups[name]
            left -= sum(rules.values())
            by_source = {
                source: sum(values["lost"].get(reason, 0) for reason in rules)
                for source, values in report["sources"].items()
            }
            share_left = round(100 * left / max(n_records, 1), 2)
            steps.append(Step(name, stage, sum(rules.values()), left, share_left, rules, by_source))
    return steps


def bars(numbers: Mapping[str, float]) -> Bars:
    """A bar for each number, 100 % being the largest."""
    largest = max(numbers.values(), default=0) or 1
    return [(label, number, round(100 * number / largest, 1)) for label, number in numbers.items()]


def _by_size(histogram: Mapping[str, int]) -> dict[str, int]:
    """A histogram over powers of two, without gaps: an empty class is a bar of no length."""
    if not histogram:
        return {}
    sizes = sorted(map(int, histogram))
    classes = [sizes[0]]
    while classes[-1] < sizes[-1]:
        classes.append(max(2 * classes[-1], 1))
    return {f"{size:,}": histogram.get(str(size), 0) for size in classes}


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
