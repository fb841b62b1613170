"""Checkpoints that DeepSpeed itself writes, and what it says stands in them: what the processes do."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from megagpt.checkpoint.open import rank_files
from megagpt.checkpoint.save import Identity, save_checkpoint
from megagpt.checkpoint.store import CheckpointStore, read_manifest
from megagpt.checkpoint.tensors import SliceReader
from megagpt.config.schema import TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.engine.engine import Engine, init_distributed
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.batches import TrainBatches
from megagpt.train.build import build_engine
from megagpt.train.schedule import lr_schedule
from megagpt.train.state import TrainState


@dataclass(frozen=True)
class Saved:
    """A run that DeepSpeed saves half-way."""

    name: str
    config: TrainingRun
    folder: Path
    """For DeepSpeed's files; our own checkpoint of the same moment goes to `folder`/ours."""
    first: int
    last: int


def _join(config: TrainingRun) -> Mesh:
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True  # it only opens the door: the arithmetic is there
    torch.set_num_threads(1)
    init_distributed(timedelta(seconds=120), device_type="cpu")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return make_mesh(rank, world_size, rank, torch.device("cpu"), config.parallel)


def save_with_deepspeed(runs: list[Saved], out: Path) -> None:
    """Train, let DeepSpeed save, make that universal, and train on; rank 0 writes the losses."""
    mesh = _join(runs[0].config)
    losses = {}
    for run in runs:
        engine = build_engine(run.config, plan_batches(run.config, mesh.world_size), mesh)
        state, before = _train(engine, run.config, TrainState(), run.first)
        # Our engine counts steps by itself where it drives the accumulation; DeepSpeed's count goes into its file.
        assert engine._engine.global_steps == run.first
        engine._engine.save_checkpoint(str(run.folder))
        save_checkpoint(
            CheckpointStore(run.folder / "ours"),
            mesh,
            engine.owned_slices(),
            TrainState(state.step, engine=engine.engine_state()).to_dict(),
            Identity(run.config.model_dump(mode="json"), "", None, (), {}),
        )
        mesh.barrier()
        if mesh.is_main:
            make_universal(run.folder / f"global_step{run.first}", run.folder / "universal")
        losses[run.name] = before + _train(engine, run.config, state, run.last)[1]
    if mesh.is_main:
        out.write_text(json.dumps(losses))
    mesh.barrier()
    torch.distributed.destroy_process_group()


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
    mesh = _join(runs[0][1])
    losses = {}
    for name, config, step_dir, last in runs:
        engine = build_engine(config, plan_batches(config, mesh.world_size), mesh)
        manifest = read_manifest(step_dir)
        state = TrainState.from_dict(manifest.state)
        with SliceReader(rank_files(step_dir, manifest)) as reader:
            engine.restore(reader, state.engine)
        losses[name] = _train(engine, config, state, last)[1]
    if mesh.is_main:
        out.write_text(json.dumps(losses))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def _train(engine: Engine, config: TrainingRun, state: TrainState, last: int) -> tuple[TrainState, list[float]]:
    mixture = open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)
    batches = TrainBatches(mixture, engine.plan, engine.mesh)
    schedule, losses = lr_schedule(config.optim, config.train.max_steps), []
    while state.step < last:
        outcome = engine.train_step(batches.step(state.step), schedule(state.step))
        state = state.after_step(engine.plan.tokens_per_step, skipped=outcome.skipped)
        losses.append(outcome.loss)
    return state, losses


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
