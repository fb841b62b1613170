"""A checkpoint's model shared out over processes, for generation and evaluation: whatever layout wrote it."""

from __future__ import annotations

from datetime import timedelta

import torch

from megagpt.checkpoint.open import Checkpoint
from megagpt.config.schema import OptimSection, ParallelSection, TrainingRun, TrainSection
from megagpt.engine.sharded import cut_for_evaluation, hollow
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
    checkpoint: Checkpoint,
    launch: Launch,
    *,
    tensor: int,
    pipeline: int,
    cut_weights: bool = False,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
) -> Mesh:
    """Join the other processes. Where there are more than a model is shared by, they make a data axis.

    Args:
        checkpoint: whose model it is.
        launch: this process's place under the launcher.
        tensor: processes that share each layer.
        pipeline: processes that share the layers.
        cut_weights: as for `read_share`.
        timeout: of collectives.

    Raises:
        ConfigError: the number of processes does not divide, or the model cannot be cut so.
    """
    if launch.world_size % (tensor * pipeline):
        raise ConfigError(
            f"the launcher started {launch.world_size} processes, which do not divide by --tensor {tensor} x "
            f"--pipeline {pipeline} = {tensor * pipeline}; start a multiple of {tensor * pipeline}: "
            f"deepspeed --num_accelerators {tensor * pipeline} ..."
        )
    parallel = ParallelSection(tensor=tensor, pipeline=pipeline, zero_stage=3 if cut_weights else 1)
    check_layout(_answering(checkpoint.config, parallel))
    return start_mesh(launch, parallel, timeout)


def read_share(
    checkpoint: Checkpoint,
    mesh: Mesh,
    dtype: torch.dtype = torch.float32,
    *,
    exact: bool = False,
    cut_weights: bool = False,
) -> ParallelDecoder:
    """The share of this place in the mesh, on its device, in evaluation mode.

    Args:
        checkpoint: of any layout.
        mesh: this process's place.
        dtype: of the weights.
        exact: as for `apply_tensor_parallel`.
        cut_weights: over the data axis too, as under ZeRO-3: a weight is whole only while it is used.
    """
    parallel = ParallelSection(tensor=mesh.tensor, pipeline=mesh.pipeline)
    config = _answering(checkpoint.config, parallel)
    with torch.device("meta"):
        model = build_model(config.model)
        apply_tensor_parallel(model, mesh, exact=exact)
        if mesh.pipeline > 1:
            model.keep_layers(own_layers(config, mesh.pipeline_rank))
    if cut_weights:
        model = hollow(model)
        return cut_for_evaluation(model, checkpoint.weights(model), dtype, mesh)
    return ParallelDecoder(checkpoint.fill(model.to_empty(device=mesh.device).to(dtype)), mesh)


def _answering(config: TrainingRun, parallel: ParallelSection) -> TrainingRun:
    """The run at another layout, without what it trained with: an optimizer that cannot be cut need not be."""
    train = TrainSection(max_steps=1, global_batch_size=1, micro_batch_size=1)
    data = config.data.model_copy(update={"isolate_documents": False})
    sections = {"parallel": parallel, "train": train, "optim": OptimSection(lr=1.0), "data": data}
    return config.model_copy(update=sections)
