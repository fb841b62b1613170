"""`megagpt checkpoint reshard | import-deepspeed` and `megagpt convert from-gguf`."""

from __future__ import annotations

from pathlib import Path

import click

from megagpt.cli_base import PATH, WITH_EXTRA_WORDS, examples


@click.command(
    "reshard",
    context_settings=WITH_EXTRA_WORDS,
    **examples(
        "megagpt checkpoint reshard runs/big runs/big16 --processes 16 parallel.tensor=2 parallel.zero_stage=3",
        "megagpt checkpoint reshard runs/big/checkpoints/step_00010000 runs/new --processes 64 "
        "configs/cluster/a100_8x8_llama_7b.yaml",
    ),
)
@click.argument("checkpoint", type=PATH)
@click.argument("run_dir", type=PATH)
@click.argument("configs", nargs=-1)
@click.option("--processes", type=click.IntRange(min=1), required=True, help="Processes of the layout, on all hosts.")
def checkpoint_reshard(checkpoint: Path, run_dir: Path, configs: tuple[str, ...], processes: int) -> None:
    """Write a checkpoint in the files of another layout, as the new run RUN_DIR.

    Any layout goes on from any checkpoint without this; from one in its own files every process reads its own file
    alone, and starts faster. CHECKPOINT is a run (its newest checkpoint) or one step's folder. CONFIGS, YAML files and
    KEY=VALUE, say what is other than in the checkpoint's own configuration. Nothing but the layout of the files
    changes; one process does it, with the memory of the largest tensor.
    """
    from megagpt.checkpoint.reshard import reshard

    click.echo(reshard(checkpoint, run_dir, processes, configs))


@click.command(
    "import-deepspeed",
    context_settings=WITH_EXTRA_WORDS,
    **examples(
        "megagpt checkpoint import-deepspeed old/checkpoints my_run.yaml run.dir=runs/imported",
        "megagpt checkpoint import-deepspeed old/checkpoints/global_step1000 my_run.yaml "
        "--trust old/checkpoints/global_step1000",
    ),
)
@click.argument("folder", type=PATH)
@click.argument("configs", nargs=-1, required=True)
@click.option(
    "--trust",
    "trusted",
    type=PATH,
    help="The same folder again, if you trust who wrote it: its pickles may then run any code. Only needed where a "
    "file holds objects of the trainer's own.",
)
def checkpoint_import_deepspeed(folder: Path, configs: tuple[str, ...], trusted: Path | None) -> None:
    """Make a run out of a checkpoint that DeepSpeed wrote.

    FOLDER is what `save_checkpoint` wrote under ZeRO-1, 2 or 3, or ZeRO-0 in fp32 (whose moments have no names: they
    are matched in the module's order and by shape), or a universal checkpoint. CONFIGS are those of `megagpt train`,
    with the model's sizes and a new run.dir. Weights, both Adam moments, step counts and the loss scale are taken;
    parameters have our names or those of Hugging Face's GPT-2, Llama or Qwen3. Pickles are read without running what
    they hold.
    """
    from megagpt.checkpoint.deepspeed_import import import_deepspeed
    from megagpt.train.command import parse_arguments

    click.echo(import_deepspeed(folder, parse_arguments(configs).load(), trusted))


@click.command(
    "from-gguf",
    **examples(
        "megagpt convert from-gguf SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2",
        "megagpt convert from-gguf model.gguf runs/model --tokenizer downloads/tokenizer.json",
    ),
)
@click.argument("file", type=PATH)
@click.argument("run_dir", type=PATH)
@click.option("--tokenizer", help="The model's own tokenizer.json, where the one in FILE cannot be rebuilt.")
def convert_from_gguf(file: Path, run_dir: Path, tokenizer: str | None) -> None:
    """Make a run with a step-0 checkpoint out of a GGUF file with a Llama in it (llama.cpp's format).

    Quantised weights are unpacked to fp32. The tokenizer is rebuilt from FILE where it is a byte-level BPE; the chat
    template is not taken over. Needs the `gguf` extra.
    """
    from megagpt.checkpoint.convert import gguf_to_checkpoint

    click.echo(gguf_to_checkpoint(file, run_dir, tokenizer))
