"""Checkpoints from and to Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megagpt import __version__
from megagpt.atomic import write_file
from megagpt.checkpoint.hf import export_hf, import_hf
from megagpt.checkpoint.open import CHECKPOINTS, open_checkpoint
from megagpt.checkpoint.save import Identity, save_checkpoint
from megagpt.checkpoint.store import CheckpointStore
from megagpt.checkpoint.tensors import MOMENTS, WEIGHT, TensorSlice
from megagpt.config.load import dump_config
from megagpt.config.schema import (
    DataSection,
    GPT2Model,
    LlamaModel,
    OptimSection,
    RunSection,
    TrainingRun,
    TrainSection,
)
from megagpt.errors import CheckpointError
from megagpt.model.build import build_model
from megagpt.parallel.mesh import Mesh
from megagpt.tokenizer import Tokenizer, open_tokenizer


def checkpoint_to_hf(checkpoint: Path, out: Path) -> str:
    """Write a checkpoint's weights and tokenizer as a folder that transformers loads.

    Returns:
        a sentence for the user.
    """
    opened = open_checkpoint(checkpoint)
    tokenizer_file = opened.path / "tokenizer.json"
    eot_id = opened.manifest.tokenizer["eot_id"] if opened.manifest.tokenizer is not None else None
    has_file = tokenizer_file.exists()
    export_hf(opened.load_model(), opened.model_config, tokenizer_file if has_file else None, out, eot_id=eot_id)
    note = "" if has_file else "; no tokenizer.json: bring the tokenizer from where it was published"
    return f"{out}: step {opened.step} of {opened.run_dir}{note}"


def hf_to_checkpoint(folder: Path, run_dir: Path) -> str:
    """Make a run whose step-0 checkpoint holds a published model's weights, with Adam's moments at zero.

    Evaluation and generation take the run as it is. To train on, give its folder as `run.dir` and the model section of
    its config.yaml.

    Returns:
        a sentence for the user.
    """
    store = CheckpointStore(run_dir / CHECKPOINTS)
    if store.steps():
        raise CheckpointError(f"{store.folder} holds checkpoints already; name another folder")
    model, state = import_hf(folder)
    tokenizer_file = folder / "tokenizer.json"
    tokenizer = open_tokenizer(tokenizer_file) if tokenizer_file.exists() else None
    config = _described_run(model, run_dir)
    save_checkpoint(
        store,
        Mesh(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")),
        _whole_slices(model, state),
        {"step": 0, "tokens": 0, "skipped_steps": 0, "engine": {"adam_step": 0}},
        _identity(config, tokenizer, (tokenizer_file,) if tokenizer is not None else ()),
    )
    write_file(run_dir / "config.yaml", dump_config(config).encode())
    note = "" if tokenizer is not None else "; the folder has no tokenizer.json, so text cannot be read or written"
    return f"{run_dir}: step 0 from {folder}{note}"


def _whole_slices(config: GPT2Model | LlamaModel, state: Mapping[str, Tensor]) -> list[TensorSlice]:
    with torch.device("meta"):
        names = [name for name, _ in build_model(config).named_parameters()]  # a tied head is named once
    slices = []
    for name in names:
        tensor = state[name]
        flat = tensor.float().reshape(-1)
        slices.append(
            TensorSlice(
                name,
                tuple(tensor.shape),
                0,
                {WEIGHT: flat, **{kind: torch.zeros_like(flat) for kind in MOMENTS}},
            )
        )
    return slices


def _described_run(model: GPT2Model | LlamaModel, run_dir: Path) -> TrainingRun:
    """A run that has not trained: only its model section means something."""
    return TrainingRun(
        run=RunSection(dir=run_dir),
        model=model,
        data=DataSection(train=Path("not-set")),
        optim=OptimSection(lr=1e-4),
        train=TrainSection(max_steps=1, global_batch_size=1, micro_batch_size=1),
    )


def _identity(config: TrainingRun, tokenizer: Tokenizer | None, files: tuple[Path, ...]) -> Identity:
    return Identity(
        config=json.loads(config.model_dump_json()),
        data_fingerprint=None,
        tokenizer=tokenizer.describe() if tokenizer is not None else None,
        tokenizer_files=files,
        versions={"megagpt": __version__},
    )
