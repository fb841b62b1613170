"""A checkpoint as evaluation, generation and export see it: model, tokenizer, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megagpt.checkpoint.store import CheckpointStore, Manifest, verify_checkpoint
from megagpt.checkpoint.tensors import WEIGHT, SliceReader
from megagpt.config.schema import GPT2Model, LlamaModel, TrainingRun
from megagpt.errors import CheckpointError
from megagpt.model.build import build_model
from megagpt.model.decoder import Decoder
from megagpt.model.flops import parameter_count
from megagpt.tokenizer import Tokenizer, open_tokenizer

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One verified checkpoint of a run."""

    path: Path
    run_dir: Path
    manifest: Manifest
    config: TrainingRun

    @property
    def step(self) -> int:
        """Optimizer steps behind these weights."""
        return self.manifest.step

    @property
    def hash(self) -> str:
        """Identity of the weights, hex."""
        return self.manifest.hash

    @property
    def model_config(self) -> GPT2Model | LlamaModel:
        """Sizes of the model."""
        return self.config.model

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with, from the checkpoint's own files.

        Raises:
            CheckpointError: the run was made from token files that name no tokenizer.
        """
        if self.manifest.tokenizer is None:
            raise CheckpointError(
                f"{self.path}: names no tokenizer, because its token files had no manifest.json; "
                "set data.tokenizer in the run's configuration"
            )
        return open_tokenizer(self.path)

    def load_model(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
        """The model with these weights, in evaluation mode; memory is the model's plus one tensor."""
        with torch.device("meta"):
            model = build_model(self.model_config)
        return self.fill(model.to_empty(device=device).to(dtype))

    def fill(self, model: Decoder) -> Decoder:
        """Give a model, or the share of it that a process holds, these weights; in evaluation mode."""
        with torch.no_grad():
            for parameter, values in self.weights(model):
                parameter.copy_(values)
        model.reset_buffers()
        return model.eval()

    def weights(self, model: Decoder) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter of a model, or of a share of it, with its fp32 values here; read one at a time."""
        with torch.device("meta"):
            whole = build_model(self.model_config)
        with SliceReader(rank_files(self.path, self.manifest)) as reader:
            reader.check_model({name: tuple(p.shape) for name, p in whole.named_parameters()})
            for name, parameter in model.named_parameters():
                shape, shard = parameter.shape, model.shards.get(name)
                values = reader.read(model.logical_name(name), WEIGHT, 0, shape.numel(), shard)
                yield parameter, values.view(shape)


def rank_files(step_dir: Path, manifest: Manifest) -> list[Path]:
    """The files that hold tensors."""
    return [step_dir / name for name in sorted(manifest.files) if name.endswith(".safetensors")]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open and verify a checkpoint.

    Args:
        path: a run's folder or its checkpoints/ (the newest complete checkpoint is taken), or one step's folder.

    Raises:
        CheckpointError: there is none, it is incomplete or damaged.
    """
    step_dir = _resolve(path)
    manifest = verify_checkpoint(step_dir)
    try:
        config = TrainingRun.model_validate_json(json.dumps(manifest.config))
    except ValidationError as error:
        raise CheckpointError(f"{step_dir}: its configuration is of another version: {error}") from None
    held = sum(path.stat().st_size for path in rank_files(step_dir, manifest))
    n_parameters = parameter_count(config.model)
    if 4 * n_parameters > held:  # before a model of that size is made
        raise CheckpointError(
            f"{step_dir}: its configuration describes a model of {n_parameters:,} parameters, "
            f"its files hold {held:,} bytes"
        )
    return Checkpoint(step_dir, step_dir.resolve().parent.parent, manifest, config)


def _resolve(path: Path) -> Path:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name a run, or one of its {CHECKPOINTS}/step_*")
    if path.name.startswith("step_"):
        return path
    store = CheckpointStore(path if path.name == CHECKPOINTS else path / CHECKPOINTS)
    found = store.survey()
    found.check_newest_readable(store.folder)
    if not found.steps:
        also = f"; {found.told()}" if found.rejected else ""
        raise CheckpointError(f"{store.folder}: holds no complete checkpoint{also}")
    return store.step_dir(found.steps[-1])
