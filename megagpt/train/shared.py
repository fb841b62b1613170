"""A checkpoint's model shared out over processes, for generation: whatever layout wrote it."""

from __future__ import annotations

import torch

from megagpt.checkpoint.open import Checkpoint
from megagpt.config.schema import ParallelSection
from megagpt.errors import ConfigError
from megagpt.model.build import build_model
from megagpt.parallel.apply_tensor import apply_tensor_parallel
from megagpt.parallel.decode import ParallelDecoder
from megagpt.parallel.plan import check_layout
from megagpt.parallel.stages import own_layers
from megagpt.train.command import Launch
from megagpt.train.start import start_mesh


def load_share(checkpoint: Checkpoint, launch: Launch, *, tensor: int, pipeline: int) -> ParallelDecoder:
    """This process's share, on its device; no process ever holds more of the model.

    Raises:
        ConfigError: the launcher started another number of processes, or the model cannot be cut so.
    """
    if launch.world_size != tensor * pipeline:
        raise ConfigError(
            f"--tensor {tensor} and --pipeline {pipeline} need {tensor * pipeline} processes, and the launcher started "
            f"{launch.world_size}: deepspeed --num_accelerators {tensor * pipeline} launch/generate.py ..."
        )
    parallel = ParallelSection(tensor=tensor, pipeline=pipeline)
    config = checkpoint.config.model_copy(update={"parallel": parallel})
    check_layout(config)
    mesh = start_mesh(launch, parallel)
    with torch.device("meta"):
        model = build_model(config.model)
        apply_tensor_parallel(model, mesh)
        if pipeline > 1:
            model.keep_layers(own_layers(config, mesh.pipeline_rank))
    return ParallelDecoder(checkpoint.fill(model.to_empty(device=mesh.device)), mesh)
