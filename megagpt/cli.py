"""`megagpt ...`: one command tree over the whole toolkit.

Thin: each command parses its arguments and calls one function, imported inside the command so that `--help` is quick
and loads no torch.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from megagpt import __version__
from megagpt.cli_base import PATH, WITH_EXTRA_WORDS, Commands, examples
from megagpt.cli_bench import bench_checkpoint, bench_train
from megagpt.cli_checkpoint import checkpoint_import_deepspeed, checkpoint_reshard, convert_from_gguf
from megagpt.cli_data import bench, data
from megagpt.cli_evals import eval_group
from megagpt.cli_generate import generate
from megagpt.cli_scoring import bench_evals
from megagpt.cli_train import plan, train
from megagpt.errors import CheckpointError


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Distributed GPT pretraining on DeepSpeed: data preparation, training, evaluation, report."""


main.add_command(data)
main.add_command(train)
main.add_command(plan)
main.add_command(bench)
main.add_command(generate)
main.add_command(eval_group)
bench.add_command(bench_train)
bench.add_command(bench_checkpoint)
bench.add_command(bench_evals)


@main.command(
    context_settings=WITH_EXTRA_WORDS,
    **examples(
        "megagpt verify configs/quickstart.yaml",
        "megagpt verify --processes 4 configs/quickstart.yaml parallel.tensor=2 parallel.zero_stage=3",
        "megagpt verify --world-size 64 configs/model/llama_7b.yaml configs/cluster/a100_8x8_llama_7b.yaml my_run.yaml",
    ),
)
@click.argument("configs", nargs=-1, required=True)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Processes to start here; by default as few as hold the layout, and 8 at most.",
)
@click.option(
    "--world-size",
    type=click.IntRange(min=1),
    help="Processes of the real run: says whether it accumulates gradients, and whether it is data-parallel.",
)
@click.option("--steps", type=click.IntRange(min=1), default=5, show_default=True, help="Optimizer steps.")
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=600.0, show_default=True, help="To wait for the processes."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(configs: tuple[str, ...], as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Prove that a run's layout trains as one process does, on this host's CPU.

    CONFIGS are those of `megagpt train`. The model and batch are made small, the layout, precision (not fp16) and
    recomputation are kept; dropout is off, and the optimizer must be AdamW. The same run is made in plain PyTorch
    without DeepSpeed; samples, initial weights, losses, gradient norms, moments and weights are compared. Neither data
    nor a GPU is needed. Exit code 0: all agrees; 1: something differs, and the table says what; 2: refused.
    """
    from rich.console import Console

    from megagpt.train.command import parse_arguments
    from megagpt.verify.run import Request, started_processes
    from megagpt.verify.run import verify as verify_layout
    from megagpt.verify.show import show

    config = parse_arguments(configs).load()
    progress = Console(stderr=True)
    with progress.status("") as status:
        say = status.update if progress.is_terminal else lambda text: progress.print(text, highlight=False)
        verdict = verify_layout(config, Request(**options), partial(started_processes, os.environ), say)
    if as_json:
        click.echo(verdict.to_json())
    else:
        console = Console()
        if not console.is_terminal:  # a log file has no width
            console.width = 160
        show(verdict, console)
    click.get_current_context().exit(0 if verdict.ok else 1)


@main.command(
    **examples(
        "megagpt doctor",
        "megagpt doctor --hostfile hosts",
        "megagpt doctor --hostfile hosts --shared /data/tokens --shared runs --json",
    ),
)
@click.option("--hostfile", type=PATH, help="Lines `NAME slots=N`, as for `deepspeed --hostfile`; this host if none.")
@click.option(
    "--shared",
    "folders",
    type=PATH,
    multiple=True,
    help="Folder that must be the same one on every host, such as run.dir's; by default the working directory.",
)
@click.option("--master-addr", help="As for deepspeed; by default the first word of the first host's `hostname -I`.")
@click.option("--master-port", type=int, default=29500, show_default=True, help="As for deepspeed.")
@click.option("--ssh-port", type=int, help="As for deepspeed --ssh_port.")
@click.option("--seconds", type=click.FloatRange(min=1), default=30.0, show_default=True, help="For the all-reduce.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(folders: tuple[Path, ...], as_json: bool, **options: Any) -> None:  # noqa: FBT001
    """Look for what would stop or spoil a run, on this host or on all of a hostfile's.

    Versions, compiler, stale locks, GPUs, disks, network, clocks, ssh, shared storage, and an all-reduce. Exit code 0:
    all well; 2: something is wrong, and the table says on which host and what to do.
    """
    from rich.console import Console

    from megagpt.doctor.examine import Request, examine
    from megagpt.doctor.show import show

    absolute = tuple(folder.absolute() for folder in folders) or (Path.cwd(),)
    examination = examine(Request(folders=absolute, **options), os.environ)
    if as_json:
        click.echo(examination.to_json())
    else:
        console = Console()
        if not console.is_terminal:  # a log file has no width
            console.width = 160
        show(examination, console)
    click.get_current_context().exit(0 if examination.ok else 2)


@main.command(
    **examples("megagpt report runs/quickstart", "megagpt report runs/quickstart --no-samples"),
)
@click.argument("run_dir", type=PATH)
@click.option(
    "--samples/--no-samples", default=True, show_default=True, help="Generate sample texts where there are none yet."
)
def report(run_dir: Path, samples: bool) -> None:  # noqa: FBT001
    """Write report.html, report.md and report.json of a run."""
    from evals.generations import DEFAULT_PROMPTS, write_generations
    from evals.report import write_run_report

    if samples:
        try:
            write_generations(run_dir, DEFAULT_PROMPTS, n_tokens=60, seed=0)
        except CheckpointError as error:  # the report goes without, and says so
            click.secho(f"no samples: {error}", err=True)
    for path in write_run_report(run_dir):
        click.echo(path)


@main.group(cls=Commands)
def convert() -> None:
    """Weights from and to the Hugging Face format, and from GGUF."""


@convert.command("to-hf", **examples("megagpt convert to-hf runs/quickstart exported"))
@click.argument("checkpoint", type=PATH)
@click.argument("out", type=PATH)
def convert_to_hf(checkpoint: Path, out: Path) -> None:
    """Write a checkpoint as a folder that transformers loads."""
    from megagpt.checkpoint.convert import checkpoint_to_hf

    click.echo(checkpoint_to_hf(checkpoint, out))


@convert.command("from-hf", **examples("megagpt convert from-hf downloads/gpt2 runs/gpt2"))
@click.argument("folder", type=PATH)
@click.argument("run_dir", type=PATH)
def convert_from_hf(folder: Path, run_dir: Path) -> None:
    """Make a run with a step-0 checkpoint out of a GPT-2 or Llama folder (safetensors)."""
    from megagpt.checkpoint.convert import hf_to_checkpoint

    click.echo(hf_to_checkpoint(folder, run_dir))


convert.add_command(convert_from_gguf)


@main.group(cls=Commands)
def checkpoint() -> None:
    """Look at a run's checkpoints, remove some, and make checkpoints of checkpoints."""


checkpoint.add_command(checkpoint_reshard)
checkpoint.add_command(checkpoint_import_deepspeed)


@checkpoint.command("list", **examples("megagpt checkpoint list runs/quickstart"))
@click.argument("run_dir", type=PATH)
def checkpoint_list(run_dir: Path) -> None:
    """Steps, sizes and hashes."""
    from megagpt.checkpoint.manage import list_checkpoints

    click.echo(list_checkpoints(run_dir))


@checkpoint.command("verify", **examples("megagpt checkpoint verify runs/quickstart"))
@click.argument("run_dir", type=PATH)
def checkpoint_verify(run_dir: Path) -> None:
    """Compare every file of every checkpoint with its manifest."""
    from megagpt.checkpoint.manage import verify_all

    click.echo(verify_all(run_dir))


@checkpoint.command(
    "prune",
    **examples(
        "megagpt checkpoint prune runs/quickstart --keep-last 1 --dry-run",
        "megagpt checkpoint prune runs/quickstart --keep-last 2 --keep-every 10000",
        "megagpt checkpoint prune runs/quickstart --keep-last 3 --damaged",
    ),
)
@click.argument("run_dir", type=PATH)
@click.option("--keep-last", type=click.IntRange(min=1), required=True, help="Newest checkpoints that are kept.")
@click.option(
    "--keep-every",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Also keep those whose step is a multiple of this.",
)
@click.option("--damaged", is_flag=True, help="Also remove checkpoints that were set aside as damaged.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
def checkpoint_prune(run_dir: Path, **options: Any) -> None:
    """Remove checkpoints that the rule does not keep, after verifying the newest, and what unfinished saves left."""
    from megagpt.checkpoint.manage import prune_run

    click.echo(prune_run(run_dir, **options))


@main.group("config", cls=Commands)
def config_group() -> None:
    """The reference of every configuration key."""


_JOB = click.option(
    "--job", type=click.Choice(["train", "data"]), default="train", show_default=True, help="Which configuration."
)


@config_group.command("docs", **examples("megagpt config docs", "megagpt config docs --job data"))
@_JOB
def config_docs(job: str) -> None:
    """Every key: type, default, meaning."""
    from megagpt.config.reference import reference

    page = reference(_schema(job))
    if job == "data":
        from data_pipeline.filters.reference import filter_reference

        page += "\n" + filter_reference()
    click.echo(page)


@config_group.command("schema", **examples("megagpt config schema > megagpt.schema.json"))
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
