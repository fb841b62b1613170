"""`megagpt eval mt-bench` and `megagpt eval answers`: what a judge rates; thin, as cli.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from megagpt.cli_base import PATH, examples
from megagpt.errors import EvalError

Command = TypeVar("Command", bound=Callable[..., Any])

_MODEL_OPTIONS = (
    click.option("--checkpoint", type=PATH, required=True, help="A run (its newest checkpoint), or one step's folder."),
    click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Answers a batch."),
    click.option(
        "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Precision."
    ),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ..."),
    click.option(
        "--limit", type=click.IntRange(min=1), help="The first ones only (of each category); all if not given."
    ),
)
_JUDGE_OPTIONS = (
    click.option("--judge", required=True, help="http://HOST/v1 (OpenAI-compatible), checkpoint:PATH, or replay:FILE."),
    click.option("--judge-model", help="The server's model; of a replayed file, whose answers are judged."),
    click.option(
        "--judge-key-env", help="Name of the environment variable with the server's key; it is stored nowhere."
    ),
    click.option(
        "--judge-parallel", type=click.IntRange(min=1), default=4, show_default=True, help="Requests at a time."
    ),
    click.option("--judge-timeout", type=click.FloatRange(min=1), default=120.0, show_default=True, help="Seconds."),
    click.option("--judge-tries", type=click.IntRange(min=1), default=5, show_default=True, help="Of each request."),
    click.option(
        "--judge-template",
        type=click.Choice(["plain", "alpaca"]),
        default="plain",
        show_default=True,
        help="Chat format of a checkpoint that judges.",
    ),
    click.option(
        "--judge-batch-size",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="Judgements a batch, of a checkpoint that judges.",
    ),
)


def _with(options: tuple[Callable[[Any], Any], ...]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command(
    "mt-bench",
    **examples(
        "megagpt eval mt-bench --checkpoint runs/chat --data eval_data --judge http://HOST/v1 --judge-model NAME",
        "megagpt eval mt-bench --checkpoint runs/chat --data eval_data --judge checkpoint:runs/judge --template alpaca",
        "megagpt eval mt-bench --checkpoint runs/chat --data eval_data --judge replay:judgements.jsonl",
        "megagpt eval mt-bench --checkpoint runs/b --against runs/a --data eval_data --judge checkpoint:runs/judge",
    ),
)
@_with(_MODEL_OPTIONS)
@click.option("--data", "data_dir", type=PATH, required=True, help="Folder with MT-Bench's files, or the one above it.")
@click.option(
    "--template",
    type=click.Choice(["plain", "alpaca"]),
    default="plain",
    show_default=True,
    help="Chat format of the model.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the answers that are drawn.")
@click.option("--against", type=PATH, help="Another checkpoint: the judge compares the two, in both orders.")
@_with(_JUDGE_OPTIONS)
def mt_bench(data_dir: Path, seed: int, limit: int | None, against: Path | None, **options: Any) -> None:
    """Let a checkpoint answer MT-Bench's two turns and a judge rate them.

    Answers are stored first and judged after; the same command goes on where it was ended.
    """
    from evals.mt_bench.pairwise import run_pairwise
    from evals.mt_bench.run import run_mt_bench
    from evals.mt_bench.setting import MTBenchRequest
    from evals.results import format_table

    judge, model = _judge_options(options), _model_request(options)
    request = MTBenchRequest(model, data_dir, judge, limit=limit, seed=seed)
    with _bars() as (console, show):
        if against is None:
            result = run_mt_bench(request, show)
        else:
            other = replace(request, model=replace(model, checkpoint=against))
            result = run_pairwise(request, other, show)
    console.print(format_table([result]))
    for category, found in result.subtasks.items():
        ratings = ", ".join(f"{name} {metric.value:.2f}" for name, metric in found["metrics"].items())
        console.print(f"{category}: {ratings or 'no rating'}", highlight=False)
    if result.reason:
        console.print(result.reason, highlight=False, markup=False)


@click.command(
    "answers",
    **examples(
        "megagpt eval answers --checkpoint runs/tuned --file test.json --judge http://HOST/v1 --judge-model NAME",
        "megagpt eval answers --checkpoint runs/tuned --file test.jsonl --judge checkpoint:runs/judge --limit 50",
    ),
)
@_with(_MODEL_OPTIONS)
@click.option("--file", type=PATH, required=True, help="Rows {instruction, input, output}: a JSON list, or JSON lines.")
@click.option(
    "--template",
    type=click.Choice(["plain", "alpaca"]),
    default="alpaca",
    show_default=True,
    help="Chat format of the model.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of an answer.")
@_with(_JUDGE_OPTIONS)
def answers(file: Path, max_new_tokens: int, limit: int | None, **options: Any) -> None:
    """Let a judge score a checkpoint's answers from 0 to 100 against the right ones.

    Answers are stored first and judged after; the same command goes on where it was ended.
    """
    from evals.judged_answers import AnswersRequest, format_extremes, run_answers
    from evals.results import format_table

    judge, model = _judge_options(options), _model_request(options)
    with _bars() as (console, show):
        request = AnswersRequest(model, file, judge, limit=limit, max_new_tokens=max_new_tokens)
        result, scored = run_answers(request, show)
    console.print(format_table([result]))
    console.print(format_extremes(scored), highlight=False, markup=False)
    if result.reason:
        console.print(result.reason, highlight=False, markup=False)


def _model_request(options: dict[str, Any]) -> Any:
    from evals.judged_model import ModelRequest

    return ModelRequest(
        options["checkpoint"],
        template=options["template"],
        batch_size=options["batch_size"],
        dtype=options["dtype"],
        device=options["device"],
    )


def _judge_options(options: dict[str, Any]) -> Any:
    from evals.judge.choose import JudgeOptions

    variable = options["judge_key_env"]
    if variable is not None and not os.environ.get(variable):
        raise EvalError(f"--judge-key-env {variable}: there is no such environment variable, or it is empty")
    return JudgeOptions(
        options["judge"],
        model=options["judge_model"],
        key=None if variable is None else os.environ[variable],
        parallel=options["judge_parallel"],
        timeout_seconds=options["judge_timeout"],
        tries=options["judge_tries"],
        template=options["judge_template"],
        device=options["device"],
        batch_size=options["judge_batch_size"],
    )


def _bars() -> Any:
    """(console, show) of a context: one bar for answers, one for judgements."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def bars() -> Any:
        console = Console()
        if not console.is_terminal:  # a log file has no width
            console.width = 120
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            ids: dict[str, Any] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in ids:
                    ids[what] = progress.add_task(what, total=total)
                progress.update(ids[what], completed=done)

            yield console, show

    return bars()
