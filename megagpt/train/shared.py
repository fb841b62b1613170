"""A checkpoint's model shared out over processes, for generation and evaluation: whatever layout wrote it."""

from __future__ import annotations

from datetime import timedelta

import torch

from megagpt.checkpoint.open import Checkpoint
from megagpt.config.schema import ParallelSection
from megagpt.errors import ConfigError
from megagpt.model.build import build_model
from megagpt.parallel.apply_tensor import apply_tensor_parallel
from megagpt.parallel.decode import ParallelDecoder
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.plan import check_layout
from megagpt.parallel.stages import own_layers
from megagpt.train.command import Launch
from megagpt.train.start import COLLECTIVE_TIMEOUT, start_mesh


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
    return read_share(checkpoint, shared_mesh(checkpoint, launch, tensor=tensor, pipeline=pipeline))


def shared_mesh(
    checkpoint: Checkpoint, launch: Launch, *, tensor: int, pipeline: int, timeout: timedelta = COLLECTIVE_TIMEOUT
) -> Mesh:
    """Join the other processes. Where there are more than a model is shared by, they make a data axis.

    Raises:
        ConfigError: the number of processes does not divide, or the model cannot be cut so.
    """
    if launch.world_size % (tensor * pipeline):
        raise ConfigError(
            f"the launcher started {launch.world_size} processes, which do not divide by --tensor {tensor} x "
            f"--pipeline {pipeline} = {tensor * pipeline}; start a multiple of {tensor * pipeline}: "
            f"deepspeed --num_accelerators {tensor * pipeline} ..."
        )
    parallel = ParallelSection(tensor=tensor, pipeline=pipeline)
    check_layout(checkpoint.config.model_copy(update={"parallel": parallel}))
    return start_mesh(launch, parallel, timeout)


def read_share(
    checkpoint: Checkpoint, mesh: Mesh, dtype: torch.dtype = torch.float32, *, exact: bool = False
) -> ParallelDecoder:
    """The share of this place in the mesh, on its device, in evaluation mode.

    Args:
        checkpoint: of any layout.
        mesh: this process's place.
        dtype: of the weights.
        exact: as for `apply_tensor_parallel`.
    """
    parallel = ParallelSection(tensor=mesh.tensor, pipeline=mesh.pipeline)
    config = checkpoint.config.model_copy(update={"parallel": parallel})
    with torch.device("meta"):
        model = build_model(config.model)
        apply_tensor_parallel(model, mesh, exact=exact)
        if mesh.pipeline > 1:
            model.keep_layers(own_layers(config, mesh.pipeline_rank))
    return ParallelDecoder(checkpoint.fill(model.to_empty(device=mesh.device).to(dtype)), mesh)
