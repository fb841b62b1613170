"""`megagpt eval ...`: benchmarks and their data; thin, as cli.py. What is judged, compared or explained is beside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from megagpt.cli_base import PATH, Commands, configs_folder, examples
from megagpt.cli_judged import answers, mt_bench
from megagpt.cli_scores import eval_compare, eval_contamination
from megagpt.cli_scoring import eval_explain
from megagpt.errors import MegaGPTError


@click.group("eval", cls=Commands)
def eval_group() -> None:
    """Score checkpoints through lm-eval."""
    # lm-eval bootstraps in forks of a process that has threads of its own, and now and then waits for one for ever.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")


eval_group.add_command(mt_bench)
eval_group.add_command(answers)
eval_group.add_command(eval_compare)
eval_group.add_command(eval_contamination)
eval_group.add_command(eval_explain)


@eval_group.command(
    "run",
    **examples(
        "megagpt eval run --checkpoint runs/quickstart --tasks heldout,megagpt_smoke",
        "megagpt eval run --checkpoint runs/quickstart --tasks arc_easy,hellaswag --data eval_data --limit 200",
        "megagpt eval run --checkpoint runs/quickstart/checkpoints/step_00000100 --tasks core --shots 5",
        "megagpt eval run --checkpoint runs/quickstart --tasks humaneval --data eval_data --allow-code",
        "deepspeed --num_accelerators 4 launch/evaluate.py --checkpoint runs/big --tasks core --tensor 2",
    ),
)
@click.option("--checkpoint", type=PATH, required=True, help="A run (its newest checkpoint), or one step's folder.")
@click.option(
    "--tasks", default="fast", show_default=True, help="Task names and suites (configs/evals), comma-separated."
)
@click.option("--data", "data_dir", type=PATH, help="Folder of local benchmark data; what it lacks comes from the hub.")
@click.option(
    "--shots",
    "n_shots",
    type=click.IntRange(min=0),
    help="Few-shot examples; the suite's or task's own where not given.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Documents a task, the first ones; where not given, those of the suite, or all.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Sequences a forward; of ends shorter than 64 tokens behind a shared beginning, more.",
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Precision."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ... of one process.")
@click.option(
    "--batch-invariant/--no-batch-invariant",
    default=True,
    show_default=True,
    help="In fp32: the same scores bit for bit at any batch size, where a check on this machine finds it so.",
)
@click.option(
    "--share-prefixes/--no-share-prefixes",
    default=True,
    show_default=True,
    help="Run what prompts have in common at the beginning once.",
)
@click.option("--allow-code", is_flag=True, help="Let humaneval run what the model writes, in a sandbox.")
@click.option(
    "--code-samples",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Completions a problem, for pass@k.",
)
@click.option(
    "--code-temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Of completions; 0: greedy.",
)
@click.option(
    "--tensor", type=click.IntRange(min=1), default=1, help="Processes that share each layer, under the launcher."
)
@click.option(
    "--pipeline", type=click.IntRange(min=1), default=1, help="Processes that share the layers, under the launcher."
)
@click.option(
    "--cut-weights",
    is_flag=True,
    help="Under the launcher: each process holds a part of every weight, as under ZeRO-3; slow, for models that fit in "
    "no other way.",
)
@click.option("--local_rank", hidden=True, type=int, help="Added by the launcher; the environment says it too.")
def eval_run(tensor: int, pipeline: int, local_rank: int | None, *, cut_weights: bool, **options: Any) -> None:
    """Score a checkpoint; one JSON file a task in RUN/evals/STEP. What is scored already is reused.

    A killed evaluation goes on where it stopped: answers are kept in RUN/evals/STEP/answers, by weights, precision,
    context, tokenizer and code, until the task's result is written; then they are removed. Where scores do not depend
    on the batch, any number of processes goes on; else only the same layout, batch size and device.

    Under the launcher (launch/evaluate.py) --tensor and --pipeline say how many processes share the model, whatever
    layout trained it; with more processes than that, each group answers its part of the questions. One process writes.
    """
    from rich.console import Console

    from evals.humaneval import CodeSettings
    from evals.results import format_table
    from evals.run import EvalRequest, run_evals

    options["code"] = CodeSettings(options.pop("code_samples"), options.pop("code_temperature"))
    options["tasks"] = tuple(name for name in options["tasks"].split(",") if name)
    request = EvalRequest(**options, suites_dir=configs_folder() / "evals")
    console = Console()
    if not console.is_terminal:  # a log file has no width
        console.width = 120
    if (
        local_rank is None
        and tensor * pipeline == 1
        and not cut_weights
        and int(os.environ.get("WORLD_SIZE", "1")) == 1
    ):
        console.print(format_table(run_evals(request, console)))
        return
    from evals.together import Layout, exit_code, run_together
    from megagpt.train.command import Launch

    launch = Launch.from_environment(os.environ)
    console.quiet = launch.rank != 0
    try:
        console.print(format_table(run_together(request, launch, Layout(tensor, pipeline, cut_weights), console)))
    except MegaGPTError as error:
        code = exit_code(error, launch)
        if launch.local_rank == 0:
            raise
        click.get_current_context().exit(code)


@eval_group.command(
    "prepare",
    **examples(
        "megagpt eval prepare --from downloads/evals --out eval_data",
        "megagpt eval prepare --from hub --tasks leaderboard_v1,lambada_openai --out eval_data",
    ),
)
@click.option(
    "--from",
    "source",
    required=True,
    help="Folder of benchmark files as their authors publish them, or the word `hub` for the Hugging Face hub.",
)
@click.option("--tasks", default="full", show_default=True, help="With `hub`: whose data sets, names and suites.")
@click.option("--out", type=PATH, required=True, help="Folder to write; give it to `eval run --data`.")
def eval_prepare(source: str, tasks: str, out: Path) -> None:
    """Build a verified local folder of benchmark data."""
    from rich.console import Console
    from rich.progress import Progress

    from evals.data import prepare
    from evals.hub import prepare_from_hub
    from evals.suites import resolve_tasks

    console = Console()
    if not console.is_terminal:  # a log file has no width
        console.width = 120
    if source == "hub":
        names = resolve_tasks(tuple(name for name in tasks.split(",") if name), configs_folder() / "evals")
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("data sets")
            report = prepare_from_hub(
                tuple(task.task for task in names if task.task != "heldout"),
                out,
                lambda done, total: progress.update(bar, completed=done, total=total),
            )
    else:
        report = prepare(Path(source), out)
    console.print(report.table())


@eval_group.command("doctor", **examples("megagpt eval doctor --data eval_data", "megagpt eval doctor"))
@click.option("--data", "data_dir", type=PATH, help="Folder of local benchmark data; only the sandbox if not given.")
def eval_doctor(data_dir: Path | None) -> None:
    """Check local benchmark data (rows, hashes, missing splits) and whether this host has the sandbox."""
    from evals.data import doctor

    click.echo(doctor(data_dir))


@eval_group.command(
    "items",
    **examples(
        "megagpt eval items --tasks arc_easy,hellaswag,mmlu,gsm8k --data eval_data --out items.jsonl",
        "megagpt eval items --tasks core --out items.jsonl",
    ),
)
@click.option("--tasks", required=True, help="Task names and suites (configs/evals), comma-separated.")
@click.option("--data", "data_dir", type=PATH, help="Folder of local benchmark data; what it lacks comes from the hub.")
@click.option("--out", type=PATH, required=True, help="File to write; a data job's decontamination.items reads it.")
def eval_items(tasks: str, data_dir: Path | None, out: Path) -> None:
    """Write the tasks' documents as texts that must not stand in training data."""
    from evals.items import write_items

    names = tuple(name for name in tasks.split(",") if name)
    click.echo(write_items(names, data_dir, out, configs_folder() / "evals"))
