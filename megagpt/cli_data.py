"""`megagpt data ...` and `megagpt bench ...`: thin, as cli.py; imports stand inside the commands that need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from megagpt.cli_base import PATH, Commands, configs_folder, examples
from megagpt.errors import ConfigError


@click.group(cls=Commands)
def data() -> None:
    """Turn raw shards into token files, and look at them."""


@data.command(
    "run",
    **examples(
        "megagpt data run configs/data/quickstart.yaml",
        "megagpt data run configs/data/quickstart.yaml 'sources=[crawl/*.warc.gz, pile/00.jsonl.zst]' out=data/mine",
        "megagpt data run configs/data/quickstart.yaml --dry-run",
        "megagpt data run crawl.yaml --executor slurm --workers 500 --stage filter",
    ),
)
@click.argument("configs", nargs=-1, required=True)
@click.option(
    "--executor",
    type=click.Choice(["local", "ray", "slurm"]),
    help="Where tasks run: this machine, a Ray cluster, Slurm job arrays; else the configuration's `executor`.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Tasks at a time; else the configuration's `workers`.")
@click.option("--stage", metavar="NAME", help="Do everything up to this stage, as --dry-run lists them, and stop.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the shards with bytes and documents, the stages, and what would be reused; write nothing.",
)
def data_run(configs: tuple[str, ...], stage: str | None, dry_run: bool, **overrides: str | int | None) -> None:  # noqa: FBT001
    """Extract, filter, deduplicate, tokenize and pack. CONFIGS are YAML files, then KEY=VALUE overrides.

    The same command goes on where it was stopped; what a changed key touches is made again.
    """
    from rich.console import Console

    from data_pipeline.config import DataJob
    from data_pipeline.run import plan_job, run_job
    from megagpt.config.load import load_arguments

    words = [f"{key}={value}" for key, value in overrides.items() if value is not None]
    job = load_arguments(DataJob, (*configs, *words))
    until = () if stage is None else (stage,)
    if dry_run:
        click.echo(plan_job(job, *until))
    else:
        run_job(job, Console(), *until)


@data.command(
    "inspect",
    **examples("megagpt data inspect data/quickstart/tokens_train", "megagpt data inspect data/quickstart"),
)
@click.argument("path", type=PATH)
@click.option("--samples", type=click.IntRange(min=0), default=3, show_default=True, help="Decoded documents to print.")
def data_inspect(path: Path, samples: int) -> None:
    """Verify token files and print counts and decoded samples. PATH is a .bin/.idx prefix or a job's folder."""
    from data_pipeline.inspect import inspect

    click.echo(inspect(path, samples))


@data.command(
    "train-classifier",
    **examples(
        "megagpt data train-classifier --positive good.jsonl.zst --negative crawl.jsonl.zst --out quality.npz",
        "megagpt data train-classifier --positive wiki --positive 'books/*.parquet' --negative data/crawl --out q.npz",
    ),
)
@click.option("--positive", multiple=True, required=True, help="Texts that shall score high: file, folder or glob.")
@click.option("--negative", multiple=True, required=True, help="Texts that shall score low; a data job's folder too.")
@click.option("--out", type=PATH, required=True, help="Model to write (.npz); filters.classifier.model reads it.")
@click.option("--validation", type=float, default=0.1, show_default=True, help="Share of texts held out.")
@click.option("--ngrams", type=click.IntRange(min=1), default=2, show_default=True, help="Runs of 1 to so many words.")
@click.option("--characters", type=click.IntRange(min=0), default=0, show_default=True, help="Runs of characters too.")
@click.option("--buckets", type=click.IntRange(8, 28), default=20, show_default=True, help="Weights: 2 to this power.")
@click.option("--max-characters", type=click.IntRange(min=0), default=10_000, show_default=True, help="Of a text.")
@click.option("--epochs", type=click.IntRange(min=1), default=3, show_default=True, help="Passes over the texts.")
@click.option("--l2", type=click.FloatRange(min=0), default=1e-6, show_default=True, help="Pull of weights towards 0.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of order and held-out share.")
@click.option("--text-key", default="text", show_default=True, help="Field of the text (jsonl, parquet).")
def data_train_classifier(**options: Any) -> None:
    """Train a classifier of texts for the filter `classifier`, and print how it does on held-out texts."""
    from rich.console import Console

    from data_pipeline.classify.features import FeatureSettings
    from data_pipeline.classify.training import TrainingRequest, train_classifier

    names = ("ngrams", "characters", "buckets", "max_characters")
    features = FeatureSettings(**{name: options.pop(name) for name in names})
    train_classifier(TrainingRequest(**options, features=features), Console())


@data.command(
    "thresholds",
    **examples(
        "megagpt data thresholds data/crawl fineweb.max_short_lines=0.5",
        "megagpt data thresholds data/crawl gopher_quality.min_words=30 c4.min_sentences=null",
    ),
)
@click.argument("folder", type=PATH)
@click.argument("rules", nargs=-1)
def data_thresholds(folder: Path, rules: tuple[str, ...]) -> None:
    """What other thresholds would keep, from what was measured; nothing is run again. RULES are RULE=VALUE."""
    from data_pipeline.filters.thresholds import describe, what_if
    from megagpt.config.load import parse_value

    for rule in rules:
        if "=" not in rule:
            raise ConfigError(f"'{rule}' says no value; expected RULE=VALUE, or RULE=null to switch the rule off")
    overrides = {name: parse_value(value) for name, _, value in (rule.partition("=") for rule in rules)}
    click.echo(describe(what_if(folder, overrides)))


@data.command("status", **examples("megagpt data status data/quickstart"))
@click.argument("folder", type=PATH)
def data_status(folder: Path) -> None:
    """What a data job has done so far."""
    from data_pipeline.status import status

    click.echo(status(folder))


@data.command("report", **examples("megagpt data report data/quickstart"))
@click.argument("folder", type=PATH)
def data_report(folder: Path) -> None:
    """Write report.html and report.md of a data job."""
    from data_pipeline.report import write_report

    click.echo(write_report(folder))


@click.group(cls=Commands)
def bench() -> None:
    """Measure the toolkit side by side with its peers and against its limits."""


@bench.command(
    "data",
    **examples(
        "megagpt bench data --against datatrove --work /tmp/bench",
        "megagpt bench data --against datatrove --pages crawl/00000.warc.gz --case pages-resiliparse --case chain",
        "megagpt bench data --grouping 120000000",
    ),
)
@click.option("--against", type=click.Choice(["datatrove"]), help="The peer that does the same work.")
@click.option(
    "--case",
    "cases",
    multiple=True,
    help="One of pages-resiliparse, pages-trafilatura, chain, dedup and tokenize; all where none is named.",
)
@click.option("--pages", type=PATH, help="Pages to read (.warc.gz); by default the installed packages' documentation.")
@click.option("--python", "python", type=PATH, help="Interpreter that has datatrove; by default one is set up.")
@click.option("--documents", type=click.IntRange(min=100), default=24_000, show_default=True, help="Base documents.")
@click.option("--grouping", type=click.IntRange(min=1), help="Group so many band rows under the memory limit.")
@click.option("--work", type=PATH, default=Path("bench"), show_default=True, help="Folder for inputs and outputs.")
@click.option("--json", "json_file", type=PATH, help="Write the figures there as well.")
def bench_data(**options: Any) -> None:
    """CPU-seconds of the data pipeline and of datatrove over the same input, and what both decided."""
    import json

    from rich.console import Console

    from data_pipeline.bench.run import BenchRequest, run_bench

    json_file = options.pop("json_file")
    result = run_bench(BenchRequest(**options, presets=configs_folder() / "data" / "filters"), Console())
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


@bench.command(
    "layouts",
    **examples(
        "megagpt bench layouts",
        "megagpt bench layouts --layout zero1 --layout zero3-dp4 --json layouts.json",
        "megagpt bench layouts --family llama train.dtype=bf16 model.max_seq_len=1024",
    ),
)
@click.option("--layout", "names", multiple=True, help="One of those of the table; all of them where none is named.")
@click.option("--family", type=click.Choice(["gpt2", "llama"]), default="gpt2", show_default=True, help="Of the model.")
@click.option("--json", "json_file", type=PATH, help="Write the figures there as well.")
@click.argument("overrides", nargs=-1)
def bench_layouts(names: tuple[str, ...], family: str, json_file: Path | None, overrides: tuple[str, ...]) -> None:
    """Peak memory of a process under each parallel layout: counted tensor by tensor, and by the formulas.

    A small model trains two steps in real local processes on the CPU. OVERRIDES are KEY=VALUE words of a training
    configuration, for every layout.
    """
    from rich.console import Console

    from megagpt.bench import layouts

    console = Console()
    if not console.is_terminal:  # a log file has no width
        console.width = 160
    rows = layouts.bench_layouts(family, names, overrides, console)
    if json_file is not None:
        json_file.write_text(layouts.to_json(rows))
