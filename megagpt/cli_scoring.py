"""`megagpt eval explain` and `megagpt bench evals`: thin, as cli.py; imports stand inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megagpt.cli_base import PATH, configs_folder, examples


@click.command(
    "explain",
    **examples(
        "megagpt eval explain megagpt_smoke 3 --checkpoint runs/quickstart",
        "megagpt eval explain mmlu_anatomy 0 --shots 5 --checkpoint runs/quickstart --data eval_data --json",
    ),
)
@click.argument("task")
@click.argument("doc", type=click.IntRange(min=0))
@click.option("--checkpoint", type=PATH, required=True, help="A run (its newest checkpoint), or one step's folder.")
@click.option("--data", "data_dir", type=PATH, help="Folder of local benchmark data; what it lacks comes from the hub.")
@click.option(
    "--shots", "n_shots", type=click.IntRange(min=0), help="Few-shot examples; the task's own where not given."
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Precision."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the whole context.")
def eval_explain(task: str, doc: int, as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Show how one document is scored: its tokens, their log-probabilities, what was cut, the decision and the gold.

    TASK is a task of lm-eval or of megagpt, not a group; DOC is the number of the document, `doc_id` in the samples
    files. The numbers are those of `eval run` with the same shots and precision.
    """
    from rich.console import Console

    from evals.explain import explain, show
    from evals.run import EvalRequest

    found = explain(EvalRequest(tasks=(task,), suites_dir=configs_folder() / "evals", **options), task, doc)
    if as_json:
        click.echo(found.to_json())
        return
    console = Console()
    if not console.is_terminal:  # a log file has no width
        console.width = 120
    show(found, console)


@click.command(
    "evals",
    **examples(
        "megagpt bench evals --checkpoint runs/quickstart --data eval_data --limit 100",
        "megagpt bench evals --checkpoint runs/quickstart --data eval_data --tasks mmlu:5,gsm8k:5:50 --json evals.json",
        "megagpt bench evals --checkpoint runs/quickstart --data eval_data --lines evals.jsonl",
    ),
)
@click.option("--checkpoint", type=PATH, required=True, help="A run (its newest checkpoint), or one step's folder.")
@click.option("--data", "data_dir", type=PATH, help="Folder of local benchmark data; what it lacks comes from the hub.")
@click.option(
    "--tasks",
    default="arc_easy:0,arc_challenge:0,hellaswag:0,mmlu:5,gsm8k:5,truthfulqa_mc1:0,truthfulqa_mc2:0",
    show_default=True,
    help="TASK, TASK:SHOTS or TASK:SHOTS:LIMIT, comma-separated.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Documents a task, the first ones; all where not given.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Of tasks that generate; each task's own number where not given (256 of gsm8k), to which the model's context "
    "must leave room.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences a forward.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Turns of each backend.")
@click.option(
    "--lines",
    type=PATH,
    help="Keep each task's measurement there at once; the same command goes on where it was ended.",
)
@click.option("--json", "json_file", type=PATH, help="Write the figures there as well.")
def bench_evals(json_file: Path | None, **options: Any) -> None:
    """Seconds that a suite takes with our backend and with lm-eval's Hugging Face backend.

    The checkpoint's weights in fp32 on the CPU, lm-eval's model being the exported one; both by turns in one process,
    with the same threads, each as lm-eval evaluates: building the requests of tasks that are loaded anew, answering,
    scoring. Without --limit that is the whole suite, and lm-eval's part of it can take an hour. Requests, answers and
    scores are compared: exit code 1 where a request is not the same to the byte, a log-likelihood differs by more than
    1e-4, a metric or a text differs, or ours is not three times as fast over all tasks and parts.

    humaneval is not among the tasks: it runs code that the model writes, and megagpt runs that in its own sandbox
    (`megagpt eval run --allow-code`) and not through lm-eval, so that there is nothing to compare. truthfulqa_gen is
    left out as well, unless --tasks names it: its 817 texts of up to 256 tokens take lm-eval's backend long.
    """
    from rich.console import Console

    from evals.bench import BenchRequest, bench
    from evals.bench_show import show

    console = Console()
    if not console.is_terminal:  # a log file has no width
        console.width = 160
    found = bench(BenchRequest(**options), console)
    show(found, console)
    if json_file is not None:
        json_file.write_text(found.to_json(), encoding="utf-8")
    click.get_current_context().exit(0 if found.ok else 1)
