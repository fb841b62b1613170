"""`megagpt eval compare` and `megagpt eval contamination`: what scores are worth."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from megagpt.cli_base import PATH, configs_folder, examples


@click.command(
    "compare",
    **examples(
        "megagpt eval compare runs/a runs/b",
        "megagpt eval compare runs/a/checkpoints/step_00001000 runs/a/checkpoints/step_00002000 --json",
        "megagpt eval compare runs/a runs/b runs/c --out comparison.html",
    ),
)
@click.argument("evaluations", type=PATH, nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--out", type=PATH, help="Also write a page (.html), markdown (.md) or JSON (.json).")
def eval_compare(evaluations: tuple[Path, ...], as_json: bool, out: Path | None) -> None:  # noqa: FBT001
    """Compare evaluations of the same documents with the first of them.

    EVALUATIONS are runs (their newest results), checkpoints, or folders of results. Each metric: both scores, the
    difference with its paired 95% interval, the exact McNemar test (of documents in groups, such as MMLU's subjects, a
    z-test over groups), corrected for the number of tests. A task with other documents, shots, prompts, data or ways to
    draw completions is not compared, and the table says what differs. It also says what differs and does not forbid to
    compare: precision, prompts that were cut on one side. Exit code 1: a task is not compared; 2: none can be.
    """
    from rich.console import Console

    from evals.compare import compare
    from evals.compare_show import comparison_table, write_comparison

    comparison = compare(evaluations)
    if out is not None:
        write_comparison(comparison, out)
    if as_json:
        click.echo(comparison.to_json())
    else:
        console = Console()
        if not console.is_terminal:  # a log file has no width
            console.width = 200
        console.print(comparison_table(comparison))
    click.get_current_context().exit(1 if any(refusal.differs for refusal in comparison.refusals) else 0)


@click.command(
    "contamination",
    **examples(
        "megagpt eval contamination --checkpoint runs/quickstart --tasks arc_easy,hellaswag,mmlu --data eval_data",
        "megagpt eval contamination --checkpoint runs/quickstart --tasks core,mt_bench --data eval_data",
        "megagpt eval contamination --tokens data/mine/tokens_train --tasks core --out contamination.json",
        "megagpt eval contamination --checkpoint runs/a --listed data/mine/contaminated_items.jsonl --tasks gsm8k",
    ),
)
@click.option("--checkpoint", "run_dir", type=PATH, help="A run: its training tokens are scanned, its report shows it.")
@click.option("--tokens", type=PATH, multiple=True, help="A .bin/.idx pair without the ending, in place of the run's.")
@click.option("--tasks", required=True, help="Task names, suites (configs/evals), mt_bench; comma-separated.")
@click.option("--data", "data_dir", type=PATH, help="Folder of local benchmark data; what it lacks comes from the hub.")
@click.option(
    "--listed",
    type=PATH,
    help="A data job's contaminated_items.jsonl. Without --tokens it stands in place of a scan of the run's tokens.",
)
@click.option("--out", type=PATH, help="File to write; by default RUN/evals/contamination.json.")
@click.option("--processes", type=click.IntRange(min=1), help="Worker processes; by default one for each CPU core.")
def eval_contamination(tasks: str, processes: int | None, **options: Any) -> None:
    """Find the benchmark documents that stand in a run's training tokens.

    A document is dirty where 13 of its words in a row stand in a training document. `megagpt report` then shows each
    score over all, clean and dirty documents.
    """
    from rich.console import Console

    from evals.contamination import ContaminationRequest, find_contamination
    from evals.contamination_file import summary

    names = tuple(name for name in tasks.split(",") if name)
    request = ContaminationRequest(
        names, processes=processes or os.cpu_count() or 1, suites_dir=configs_folder() / "evals", **options
    )
    click.echo(summary(find_contamination(request, Console(stderr=True))))
