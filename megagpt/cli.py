"""`megagpt ...`: one command tree over the whole toolkit.

Thin: each command parses its arguments and calls one function, imported inside the command so that `--help` is quick
and loads no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from megagpt import __version__
from megagpt.errors import CheckpointError, MegaGPTError


class _Commands(click.Group):
    """A command group whose user errors are one message and an exit code, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MegaGPTError as error:
            click.secho(f"error: {error}", fg="red", err=True)
            ctx.exit(error.exit_code)


class _Examples(click.Command):
    """A command whose epilog (examples) keeps its line breaks."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        if self.epilog:
            formatter.write_paragraph()
            formatter.write(self.epilog.strip("\n") + "\n")


def _configs() -> Path:
    """configs/ of the checkout that this file is part of, or of the working directory for an installed package."""
    beside = Path(__file__).resolve().parent.parent / "configs"
    return beside if beside.is_dir() else Path("configs")


def _examples(*lines: str) -> dict[str, Any]:
    return {"cls": _Examples, "epilog": "\n".join(["Examples:", *(f"  {line}" for line in lines)])}


_PATH = click.Path(path_type=Path)
_WITH_EXTRA_WORDS = {"ignore_unknown_options": True}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Distributed GPT pretraining on DeepSpeed: data preparation, training, evaluation, report."""


@main.command(
    context_settings=_WITH_EXTRA_WORDS,
    **_examples(
        "megagpt train configs/quickstart.yaml",
        "megagpt train --processes 2 configs/quickstart.yaml parallel.zero_stage=2 run.dir=runs/two",
        "megagpt train --launcher-args '--hostfile hosts' configs/model/gpt2_124m.yaml my_run.yaml optim.lr=3e-4",
        "megagpt train --check configs/quickstart.yaml",
    ),
)
@click.argument("configs", nargs=-1, required=True)
@click.option(
    "--processes", type=click.IntRange(min=1), help="Processes (accelerators) on this host; DeepSpeed's default."
)
@click.option("--launcher-args", default="", help="Further arguments of the `deepspeed` launcher, as one string.")
@click.option(
    "--check", is_flag=True, help="Resolve the configuration, print the plan and exit; no accelerator needed."
)
def train(configs: tuple[str, ...], processes: int | None, launcher_args: str, check: bool) -> None:  # noqa: FBT001
    """Train a model under the DeepSpeed launcher. CONFIGS are YAML files, then KEY=VALUE overrides."""
    from megagpt.train.command import launcher_command, parse_arguments

    config = parse_arguments(configs).load()  # wrong input is told before any process starts
    if check:
        from megagpt.train.describe import check_run

        click.echo(check_run(config, processes or 1))
        return
    command = launcher_command(processes, launcher_args, configs)
    os.execve(command[0], command, os.environ | {"PYTHONUNBUFFERED": "1"})  # signals then reach the launcher itself


@main.group(cls=_Commands)
def data() -> None:
    """Turn raw shards into token files, and look at them."""


@data.command(
    "run",
    **_examples(
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
@click.option("--stage", metavar="NAME", help="Do everything up to this stage, and stop.")
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
    if dry_run:
        click.echo(plan_job(job))
    elif stage is None:
        run_job(job, Console())
    else:
        run_job(job, Console(), stage)


@data.command(
    "inspect",
    **_examples("megagpt data inspect data/quickstart/quickstart_train", "megagpt data inspect data/quickstart"),
)
@click.argument("path", type=_PATH)
@click.option("--samples", type=click.IntRange(min=0), default=3, show_default=True, help="Decoded documents to print.")
def data_inspect(path: Path, samples: int) -> None:
    """Verify token files and print counts and decoded samples. PATH is a .bin/.idx prefix or a job's folder."""
    from data_pipeline.inspect import inspect

    click.echo(inspect(path, samples))


@data.command(
    "train-classifier",
    **_examples(
        "megagpt data train-classifier --positive good.jsonl.zst --negative crawl.jsonl.zst --out quality.npz",
        "megagpt data train-classifier --positive wiki --positive 'books/*.parquet' --negative data/crawl --out q.npz",
    ),
)
@click.option("--positive", multiple=True, required=True, help="Texts that shall score high: file, folder or glob.")
@click.option("--negative", multiple=True, required=True, help="Texts that shall score low; a data job's folder too.")
@click.option("--out", type=_PATH, required=True, help="Model to write (.npz); filters.classifier.model reads it.")
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
    **_examples(
        "megagpt data thresholds data/crawl fineweb.max_short_lines=0.5",
        "megagpt data thresholds data/crawl gopher_quality.min_words=30 c4.min_sentences=null",
    ),
)
@click.argument("folder", type=_PATH)
@click.argument("rules", nargs=-1)
def data_thresholds(folder: Path, rules: tuple[str, ...]) -> None:
    """What other thresholds would keep, from what was measured; nothing is run again. RULES are RULE=VALUE."""
    from data_pipeline.filters.thresholds import describe, what_if
    from megagpt.config.load import parse_value

    overrides = {name: parse_value(value) for name, _, value in (rule.partition("=") for rule in rules)}
    click.echo(describe(what_if(folder, overrides)))


@data.command("status", **_examples("megagpt data status data/quickstart"))
@click.argument("folder", type=_PATH)
def data_status(folder: Path) -> None:
    """What a data job has done so far."""
    from data_pipeline.status import status

    click.echo(status(folder))


@data.command("report", **_examples("megagpt data report data/quickstart"))
@click.argument("folder", type=_PATH)
def data_report(folder: Path) -> None:
    """Write report.html and report.md of a data job."""
    from data_pipeline.report import write_report

    click.echo(write_report(folder))


@main.group(cls=_Commands)
def bench() -> None:
    """Measure the toolkit side by side with its peers and against its limits."""


@bench.command(
    "data",
    **_examples(
        "megagpt bench data --against datatrove --work /tmp/bench",
        "megagpt bench data --against datatrove --pages crawl/00000.warc.gz --case pages-resiliparse --case chain",
        "megagpt bench data --grouping 120000000",
    ),
)
@click.option("--against", type=click.Choice(["datatrove"]), help="The peer that does the same work.")
@click.option("--case", "cases", multiple=True, help="One piece of work; all where none is named.")
@click.option("--pages", type=_PATH, help="Pages to read (.warc.gz); by default the installed packages' documentation.")
@click.option("--python", "python", type=_PATH, help="Interpreter that has datatrove; by default one is set up.")
@click.option("--documents", type=click.IntRange(min=100), default=24_000, show_default=True, help="Base documents.")
@click.option("--grouping", type=click.IntRange(min=1), help="Group so many band rows under the memory limit.")
@click.option("--work", type=_PATH, default=Path("bench"), show_default=True, help="Folder for inputs and outputs.")
@click.option("--json", "json_file", type=_PATH, help="Write the figures there as well.")
def bench_data(**options: Any) -> None:
    """CPU-seconds of the data pipeline and of datatrove over the same input, and what both decided."""
    import json

    from rich.console import Console

    from data_pipeline.bench.run import BenchRequest, run_bench

    json_file = options.pop("json_file")
    result = run_bench(BenchRequest(**options, presets=_configs() / "data" / "filters"), Console())
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")


@main.group("eval", cls=_Commands)
def eval_group() -> None:
    """Score checkpoints through lm-eval."""


@eval_group.command(
    "run",
    **_examples(
        "megagpt eval run --checkpoint runs/quickstart --tasks heldout,megagpt_smoke",
        "megagpt eval run --checkpoint runs/quickstart --tasks arc_easy,hellaswag --data eval_data --limit 200",
        "megagpt eval run --checkpoint runs/quickstart/checkpoints/step_00000100 --tasks core --shots 5",
    ),
)
@click.option("--checkpoint", type=_PATH, required=True, help="A run (its newest checkpoint), or one step's folder.")
@click.option(
    "--tasks", default="fast", show_default=True, help="Task names and suites (configs/evals), comma-separated."
)
@click.option(
    "--data", "data_dir", type=_PATH, help="Folder of local benchmark data; what it lacks comes from the hub."
)
@click.option(
    "--shots",
    "n_shots",
    type=click.IntRange(min=0),
    help="Few-shot examples; the suite's or task's own where not given.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Documents a task, the first ones; all where not given.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Sequences a forward.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Precision."
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
def eval_run(**options: Any) -> None:
    """Score a checkpoint; one JSON file a task in RUN/evals/STEP. What is scored already is reused."""
    from rich.console import Console

    from evals.results import format_table
    from evals.run import EvalRequest, run_evals

    options["tasks"] = tuple(name for name in options["tasks"].split(",") if name)
    console = Console()
    if not console.is_terminal:  # a log file has no width
        console.width = 120
    console.print(format_table(run_evals(EvalRequest(**options, suites_dir=_configs() / "evals"), console)))


@eval_group.command("prepare", **_examples("megagpt eval prepare --from downloads/evals --out eval_data"))
@click.option(
    "--from", "source", type=_PATH, required=True, help="Folder of benchmark files as their authors publish them."
)
@click.option("--out", type=_PATH, required=True, help="Folder to write; give it to `eval run --data`.")
def eval_prepare(source: Path, out: Path) -> None:
    """Build a verified local folder of benchmark data."""
    from evals.data import prepare

    click.echo(str(prepare(source, out)))


@eval_group.command("doctor", **_examples("megagpt eval doctor --data eval_data"))
@click.option("--data", "data_dir", type=_PATH, required=True, help="Folder of local benchmark data.")
def eval_doctor(data_dir: Path) -> None:
    """Check local benchmark data: rows, hashes, missing splits."""
    from evals.data import doctor

    click.echo(doctor(data_dir))


@eval_group.command(
    "items",
    **_examples(
        "megagpt eval items --tasks arc_easy,hellaswag,mmlu,gsm8k --data eval_data --out items.jsonl",
        "megagpt eval items --tasks core --out items.jsonl",
    ),
)
@click.option("--tasks", required=True, help="Task names and suites (configs/evals), comma-separated.")
@click.option(
    "--data", "data_dir", type=_PATH, help="Folder of local benchmark data; what it lacks comes from the hub."
)
@click.option("--out", type=_PATH, required=True, help="File to write; a data job's decontamination.items reads it.")
def eval_items(tasks: str, data_dir: Path | None, out: Path) -> None:
    """Write the tasks' documents as texts that must not stand in training data."""
    from evals.items import write_items

    names = tuple(name for name in tasks.split(",") if name)
    click.echo(write_items(names, data_dir, out, _configs() / "evals"))


@main.command(
    **_examples("megagpt report runs/quickstart", "megagpt report runs/quickstart --no-samples"),
)
@click.argument("run_dir", type=_PATH)
@click.option(
    "--samples/--no-samples", default=True, show_default=True, help="Generate sample texts where there are none yet."
)
def report(run_dir: Path, samples: bool) -> None:  # noqa: FBT001
    """Write report.html and report.md of a run."""
    from evals.generations import DEFAULT_PROMPTS, write_generations
    from evals.report import write_run_report

    if samples:
        try:
            write_generations(run_dir, DEFAULT_PROMPTS, n_tokens=60, seed=0)
        except CheckpointError as error:  # the report goes without, and says so
            click.secho(f"no samples: {error}", err=True)
    for path in write_run_report(run_dir):
        click.echo(path)


@main.command(
    **_examples(
        "megagpt generate --checkpoint runs/quickstart --prompt 'Return the'",
        "megagpt generate --checkpoint runs/quickstart --prompt 'The module' --temperature 0.8 --top-p 0.95 --seed 1",
    ),
)
@click.option("--checkpoint", type=_PATH, required=True, help="A run (its newest checkpoint), or one step's folder.")
@click.option(
    "--prompt", "prompts", multiple=True, required=True, help="Text to go on from; may be given several times."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens to add.")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--top-k", type=click.IntRange(min=1), help="Sample among the k likeliest tokens.")
@click.option(
    "--top-p", type=click.FloatRange(min=0, max=1, min_open=True), help="Sample within this probability mass."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sampling.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ...")
def generate(prompts: tuple[str, ...], **options: Any) -> None:
    """Let a checkpoint go on from a prompt."""
    from megagpt.generate import generate_text

    for text in generate_text(prompts=prompts, **options):
        click.echo(text)


@main.group(cls=_Commands)
def convert() -> None:
    """Weights from and to the Hugging Face format."""


@convert.command("to-hf", **_examples("megagpt convert to-hf runs/quickstart exported"))
@click.argument("checkpoint", type=_PATH)
@click.argument("out", type=_PATH)
def convert_to_hf(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint as a folder that transformers loads."""
    from megagpt.checkpoint.convert import checkpoint_to_hf

    click.echo(checkpoint_to_hf(checkpoint, out))


@convert.command("from-hf", **_examples("megagpt convert from-hf downloads/gpt2 runs/gpt2"))
@click.argument("folder", type=_PATH)
@click.argument("run_dir", type=_PATH)
def convert_from_hf(folder: Path, run_dir: Path) -> None:
    """Make a run with a step-0 checkpoint out of a GPT-2 or Llama folder (safetensors)."""
    from megagpt.checkpoint.convert import hf_to_checkpoint

    click.echo(hf_to_checkpoint(folder, run_dir))


@main.group(cls=_Commands)
def checkpoint() -> None:
    """Look at a run's checkpoints."""


@checkpoint.command("list", **_examples("megagpt checkpoint list runs/quickstart"))
@click.argument("run_dir", type=_PATH)
def checkpoint_list(run_dir: Path) -> None:
    """Steps, sizes and hashes."""
    from megagpt.checkpoint.store import list_checkpoints

    click.echo(list_checkpoints(run_dir))


@checkpoint.command("verify", **_examples("megagpt checkpoint verify runs/quickstart"))
@click.argument("run_dir", type=_PATH)
def checkpoint_verify(run_dir: Path) -> None:
    """Compare every file of every checkpoint with its manifest."""
    from megagpt.checkpoint.store import verify_all

    click.echo(verify_all(run_dir))


@main.group("config", cls=_Commands)
def config_group() -> None:
    """The reference of every configuration key."""


_JOB = click.option(
    "--job", type=click.Choice(["train", "data"]), default="train", show_default=True, help="Which configuration."
)


@config_group.command("docs", **_examples("megagpt config docs", "megagpt config docs --job data"))
@_JOB
def config_docs(job: str) -> None:
    """Every key: type, default, meaning."""
    from megagpt.config.reference import reference

    page = reference(_schema(job))
    if job == "data":
        from data_pipeline.filters.reference import filter_reference

        page += "\n" + filter_reference()
    click.echo(page)


@config_group.command("schema", **_examples("megagpt config schema > megagpt.schema.json"))
@_JOB
def config_schema(job: str) -> None:
    """JSON Schema, for editors."""
    from megagpt.config.reference import json_schema

    click.echo(json_schema(_schema(job)))


def _schema(job: str) -> Any:
    if job == "data":
        from data_pipeline.config import DataJob

        return DataJob
    from megagpt.config.schema import TrainingRun

    return TrainingRun
