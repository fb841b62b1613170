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
    ),
)
@click.argument("configs", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Print the shards and stages, and what would be reused; write nothing.")
def data_run(configs: tuple[str, ...], dry_run: bool) -> None:  # noqa: FBT001
    """Extract, filter, deduplicate, tokenize and pack. CONFIGS are YAML files, then KEY=VALUE overrides.

    The same command goes on where it was stopped; what a changed key touches is made again.
    """
    from rich.console import Console

    from data_pipeline.config import DataJob
    from data_pipeline.run import plan_job, run_job
    from megagpt.config.load import load_arguments

    job = load_arguments(DataJob, configs)
    if dry_run:
        click.echo(plan_job(job))
    else:
        run_job(job, Console())


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


@data.command("status", **_examples("megagpt data status data/quickstart"))
@click.argument("folder", type=_PATH)
def data_status(folder: Path) -> None:
    """What a data job has done so far."""
    from data_pipeline.report import status

    click.echo(status(folder))


@data.command("report", **_examples("megagpt data report data/quickstart"))
@click.argument("folder", type=_PATH)
def data_report(folder: Path) -> None:
    """Write report.html and report.md of a data job."""
    from data_pipeline.report import write_report

    click.echo(write_report(folder))


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

    click.echo(reference(_schema(job)))


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
