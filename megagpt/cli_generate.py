"""`megagpt generate`: in one process, or in several under the launcher (launch/generate.py)."""

from __future__ import annotations

import os
from typing import Any

import click

from megagpt.cli_base import PATH, examples


@click.command(  # type: ignore[untyped-decorator]
    **examples(
        "megagpt generate --checkpoint runs/quickstart --prompt 'Return the'",
        "megagpt generate --checkpoint runs/quickstart --prompt 'The module' --temperature 0.8 --top-p 0.95 --seed 1",
        "deepspeed --num_accelerators 4 launch/generate.py --checkpoint runs/big --prompt 'So' --tensor 2 --pipeline 2",
    ),
)
@click.option("--checkpoint", type=PATH, required=True, help="A run (its newest checkpoint), or one step's folder.")
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
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 ... of one process.")
@click.option(
    "--tensor", type=click.IntRange(min=1), default=1, help="Processes that share each layer, under the launcher."
)
@click.option(
    "--pipeline", type=click.IntRange(min=1), default=1, help="Processes that share the layers, under the launcher."
)
@click.option("--local_rank", hidden=True, type=int, help="Added by the launcher; the environment says it too.")
def generate(
    prompts: tuple[str, ...], device: str, tensor: int, pipeline: int, local_rank: int | None, **options: Any
) -> None:
    """Let a checkpoint go on from a prompt."""
    from megagpt.generate import generate_text

    if local_rank is None and tensor * pipeline == 1:
        for text in generate_text(prompts=prompts, load=lambda found: found.load_model(device=device), **options):
            click.echo(text)
        return
    from megagpt.train.command import Launch
    from megagpt.train.shared import load_share

    launch = Launch.from_environment(os.environ)
    texts = generate_text(
        prompts=prompts, load=lambda found: load_share(found, launch, tensor=tensor, pipeline=pipeline), **options
    )
    for text in texts if launch.rank == 0 else ():
        click.echo(text)
