"""What `megagpt bench evals` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from evals.bench import Bench, BenchRow
from evals.bench_measure import OURS, THEIRS, Seconds


def show(found: Bench, console: Console) -> None:
    """Seconds of each part of each task, then tokens and whether the answers are the same."""
    console.print(_seconds_table(found))
    console.print(_answers_table(found))
    for row in found.rows:
        for difference in row.differences:
            console.print(f"{row.task}: {difference}", highlight=False, markup=False)
    console.print("the same bit for bit at any batch size: " + ("yes" if found.batch_invariant else "no"))


def _seconds_table(found: Bench) -> Table:
    title = f"seconds, fp32, {found.n_threads} threads: building requests, answering, scoring; all; CPU time"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for backend in (OURS, THEIRS):
        for part in ("build", "answer", "score", "all", "cpu"):
            table.add_column(f"{backend}\n{part}" if part == "build" else f"\n{part}", justify="right")
    table.add_column("times faster\nanswering", justify="right")
    table.add_column("\nall", justify="right")
    for row in found.rows:
        _add_seconds(table, row.task, row.seconds)
    table.add_section()
    _add_seconds(table, "all", {backend: found.sum(backend) for backend in (OURS, THEIRS)})
    return table


def _add_seconds(table: Table, name: str, seconds: dict[str, Seconds]) -> None:
    parts = [
        f"{part:,.1f}"
        for backend in (OURS, THEIRS)
        for part in (
            seconds[backend].requests,
            seconds[backend].answers,
            seconds[backend].metrics,
            seconds[backend].total,
            seconds[backend].cpu,
        )
    ]
    ours, theirs = seconds[OURS], seconds[THEIRS]
    table.add_row(name, *parts, f"{theirs.answers / ours.answers:.1f}", f"{theirs.total / ours.total:.1f}")


def _answers_table(found: Bench) -> Table:
    table = Table(title="tokens of the requests, and how alike the answers are", title_justify="left")
    for column in ("task", "requests", "tokens", "of them run", "a second", "hf's", "largest difference", "same"):
        table.add_column(column, justify="left" if column in ("task", "same") else "right")
    for row in found.rows:
        table.add_row(
            row.task,
            f"{row.n_requests:,}",
            f"{row.tokens_naive:,}",
            f"{row.tokens_computed:,}" if row.tokens_computed else "-",
            *(f"{row.tokens_naive / row.seconds[backend].total:,.0f}" for backend in (OURS, THEIRS)),
            f"{row.largest_difference:.1e}",
            _same(row),
        )
    return table


def _same(row: BenchRow) -> str:
    wrong = ["requests"] * (not row.same_requests) + [f"{row.n_other_texts} texts"] * bool(row.n_other_texts)
    wrong += [f"{len(row.differences)} metrics"] * bool(row.differences)
    return f"NO ({', '.join(wrong)})" if wrong else "yes"
