"""Checkpoints that DeepSpeed itself writes, and what it says stands in them: what the processes do."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megagpt.config.schema import TrainingRun
from megagpt.engine.engine import init_distributed
from megagpt.train.state import TrainState
from tests.distributed.engines import engine_for, join, leave, restore, save, train


@dataclass(frozen=True)
class Saved:
    """A run that DeepSpeed saves half-way."""

    name: str
    config: TrainingRun
    folder: Path
    """For DeepSpeed's files; our own checkpoint of the same moment goes to `folder`/ours."""
    first: int
    last: int


def save_with_deepspeed(runs: list[Saved], out: Path) -> None:
    """Train, let DeepSpeed save, make that universal, and train on; rank 0 writes the losses."""
    mesh = join(runs[0].config)
    losses = {}
    for run in runs:
        engine = engine_for(run.config, mesh)
        state, before = train(engine, run.config, TrainState(), run.first)
        # Our engine counts steps by itself where it drives the accumulation; DeepSpeed's count goes into its file.
        assert engine._engine.global_steps == run.first
        engine._engine.save_checkpoint(str(run.folder))
        save(engine, run.config, state, run.folder / "ours")
        mesh.barrier()
        if mesh.is_main and run.config.parallel.zero_stage:  # it is for sharded ones alone
            make_universal(run.folder / f"global_step{run.first}", run.folder / "universal")
        losses[run.name] = before + train(engine, run.config, state, run.last)[1]
    if mesh.is_main:
        out.write_text(json.dumps(losses))
    leave(mesh)


def make_universal(folder: Path, out: Path) -> None:
    """DeepSpeed's own conversion."""
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def go_on(runs: list[tuple[str, TrainingRun, Path, int]], out: Path) -> None:
    """(name, configuration, checkpoint, last step) -> losses from the checkpoint on."""
    mesh = join(runs[0][1])
    losses = {}
    for name, config, step_dir, last in runs:
        engine = engine_for(config, mesh)
        state, _ = restore(engine, step_dir)
        losses[name] = train(engine, config, state, last)[1]
    if mesh.is_main:
        out.write_text(json.dumps(losses))
    leave(mesh)


def save_a_hugging_face_model(family: str, folder: Path, client_state: dict[str, object]) -> None:
    """A trainer that knows nothing of us: transformers' model, DeepSpeed's ZeRO-2.

    Writes:
        `folder`/state.pt: what DeepSpeed's public API says of each parameter: weight and both moments.
        `folder`/config: transformers' configuration.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(4)
    init_distributed(timedelta(seconds=120), device_type="cpu")
    if family == "gpt2":
        sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    else:
        sizes = {"vocab_size": 61, "max_position_embeddings": 16, "hidden_size": 24, "intermediate_size": 40}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))
    settings = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings, dist_init_required=False)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    for _ in range(3):
        tokens = torch.randint(0, 61, (4, 16), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(folder), client_state=client_state)
    state = {
        name: [
            safe_get_full_fp32_param(parameter),
            *(safe_get_full_optimizer_state(parameter, kind) for kind in ("exp_avg", "exp_avg_sq")),
        ]
        for name, parameter in engine.module.named_parameters()
    }
    if torch.distributed.get_rank() == 0:
        torch.save(state, folder / "state.pt")
        model.config.save_pretrained(folder / "config")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
