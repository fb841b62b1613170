"""`megagpt bench train|checkpoint`: thin, as cli.py; imports stand inside the command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from megagpt.cli_base import PATH, WITH_EXTRA_WORDS, examples


@click.command(
    "train",
    context_settings=WITH_EXTRA_WORDS,
    **examples(
        "megagpt bench train configs/bench.yaml model.max_seq_len=512",
        "megagpt bench train configs/bench.yaml --against plain --rounds 9 train.compile=true --json speed.json",
        "megagpt bench train configs/bench.yaml --steps 20 train.micro_batch_size=32 train.global_batch_size=32",
    ),
)
@click.argument("configs", nargs=-1, required=True)
@click.option(
    "--against", default="plain,nanogpt,litgpt", show_default=True, help="Other loops, comma-separated; '' for none."
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Turns of each loop.")
@click.option("--steps", type=click.IntRange(min=1), default=4, show_default=True, help="Timed steps a turn.")
@click.option("--warmup", type=click.IntRange(min=0), default=3, show_default=True, help="Untimed steps before.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each loop on a CPU; PyTorch's choice if none.")
@click.option("--json", "json_file", type=PATH, help="Write the figures there as well.")
def bench_train(configs: tuple[str, ...], against: str, json_file: Path | None, **options: Any) -> None:
    """Tokens a second of our engine's training step, beside other loops over the same sizes.

    CONFIGS are those of a run, then KEY=VALUE overrides: the model, train.*, optim.* and parallel.zero_stage count. One
    process, one GPU if there is one. Loops take turns, each in a process of its own; all stay in memory, so name fewer
    with --against where it is short. `plain` is a plain PyTorch loop over our model; `nanogpt` and `litgpt` are
    equivalents of those projects' loops, written from their documentation.
    """
    from rich.console import Console

    from megagpt.bench.compare import BenchRequest, compare, parse_peers, write_json
    from megagpt.bench.show import show
    from megagpt.config.load import load_arguments
    from megagpt.config.schema import TrainingRun
    from megagpt.train.environment import name_process, put_environment_first

    request = BenchRequest(load_arguments(TrainingRun, configs), parse_peers(against), **options)
    environment = dict(os.environ)
    put_environment_first(environment)
    name_process(environment)
    console = Console()
    if not console.is_terminal:  # a log file has no width
        console.width = 160
    with console.status("starting") as status:
        found = compare(request, environment, lambda text: status.update(text))
    show(found, console)
    if json_file is not None:
        write_json(found, json_file)


@click.command(
    "checkpoint",
    **examples(
        "megagpt bench checkpoint",
        "megagpt bench checkpoint --folder /scratch --gigabytes 8 --rounds 3 --json checkpoint.json",
    ),
)
@click.option(
    "--folder", type=PATH, default=Path(), show_default=True, help="On the disk to use; what is written is removed."
)
@click.option(
    "--gigabytes", type=click.FloatRange(min=0.001), default=1.0, show_default=True, help="Of weights and moments."
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Saves that count.")
@click.option("--json", "json_file", type=PATH, help="Write the figures there as well.")
def bench_checkpoint(folder: Path, gigabytes: float, rounds: int, json_file: Path | None) -> None:
    """What an asynchronous save costs training, and what checksums cost the save.

    Exit code 1 where training waits for more than 1.5 times the copy to host memory, or checksums take over 5% of the
    save, as they do on a disk that writes more than about 2 GB/s.
    """
    from rich.console import Console

    from megagpt.bench import checkpoint

    cost = checkpoint.bench_checkpoint(folder, int(gigabytes * 1e9), rounds)
    checkpoint.show(cost, Console())
    if json_file is not None:
        json_file.write_text(cost.to_json(), encoding="utf-8")
    good = cost.blocked_ratio < checkpoint.MOST_BLOCKED and cost.checksum_share < checkpoint.MOST_CHECKSUM
    click.get_current_context().exit(0 if good else 1)
