"""A comparison as people read it: a table in the terminal, a page, markdown."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from evals import report_numbers as numbers
from evals.compare import ALPHA, MCNEMAR, Comparison, Difference
from evals.report_page import render
from megagpt.atomic import write_file
from megagpt.errors import EvalError

DETECTABLE = "Detectable: the true difference that 4 of 5 such evaluations would show."
TEMPLATES = {".html": "compare.html", ".md": "compare.md"}


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write a page (.html), markdown (.md) or JSON (.json), by the name of the file.

    Raises:
        EvalError: the name ends otherwise.
    """
    if path.suffix == ".json":
        write_file(path, comparison.to_json().encode() + b"\n")
    elif path.suffix in TEMPLATES:
        view = {"comparison": comparison, "alpha": ALPHA, "how": how_many(comparison)}
        write_file(path, render(TEMPLATES[path.suffix], view).encode())
    else:
        raise EvalError(f"{path}: a comparison is written as .html, .md or .json")


def how_many(comparison: Comparison) -> str:
    """What the corrected p-values are corrected for."""
    n = len(comparison.differences)
    return "one test, nothing to correct for" if n == 1 else f"corrected for {n} tests (Holm)"


def tests_of(comparison: Comparison) -> str:
    """Which tests the p-values are of, and over what."""
    words = {
        MCNEMAR: "McNemar's exact test where answers are right or wrong",
        "paired z": "paired z-test of other means",
        "paired z, over groups": "of documents in groups (MMLU's subjects), z-test over groups, as the interval",
    }
    made = {row.test for row in comparison.differences}
    return "; ".join(told for test, told in words.items() if test in made)


def comparison_table(comparison: Comparison) -> Table:
    """One row a metric; below, what was refused and why."""
    refused = [f"not compared: {r.task} ({r.a} and {r.b}): {'; '.join(r.reasons)}" for r in comparison.refusals]
    noted = [f"not the same: {task} ({a} and {b}): {told}" for task, a, b, told in comparison.notes()]
    explained = f"p: {tests_of(comparison)}; {how_many(comparison)}. {DETECTABLE}"
    table = Table(
        title=escape(f"against {comparison.labels[0]}"),
        caption=escape("\n".join([explained, *noted, *refused])),
        caption_justify="left",
    )
    for column in ("task", "metric", "n"):
        table.add_column(column, overflow="fold")
    for column in ("A", "B", "B - A", "95% interval", "only A", "only B", "p", "p corr.", "detect."):
        table.add_column(column, justify="right")
    table.add_column("verdict", overflow="fold")
    for row in comparison.differences:
        table.add_row(*_cells(row, several=len(comparison.labels) > 2))
    return table


def _cells(row: Difference, *, several: bool) -> list[str]:
    verdict = f"[bold]{escape(row.verdict)}[/bold]" if row.is_shown else row.verdict
    return [
        escape(f"{row.task} ({row.b})" if several else row.task),
        escape(row.metric),
        f"{row.n:,}",
        numbers.score(row.score_a),
        numbers.score(row.score_b),
        numbers.signed(row.difference),
        numbers.signed_interval(row.ci95),
        "" if row.only_a is None else f"{row.only_a:,}",
        "" if row.only_b is None else f"{row.only_b:,}",
        numbers.p_value(row.p),
        numbers.p_value(row.p_holm),
        "" if row.detectable is None else numbers.score(row.detectable),
        verdict,
    ]
