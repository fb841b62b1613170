"""Configuration and place in the mesh -> the layers that a process holds, without memory behind them."""

from __future__ import annotations

import torch

from megagpt.config.schema import TrainingRun
from megagpt.model.build import build_model
from megagpt.model.decoder import Decoder
from megagpt.parallel.apply_tensor import apply_tensor_parallel
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.sequence import apply_sequence_parallel
from megagpt.parallel.stages import own_layers


def meta_share(config: TrainingRun, mesh: Mesh) -> Decoder:
    """What this process holds of the model, cut while it is on the meta device."""
    with torch.device("meta"):
        model = build_model(config.model)
        apply_tensor_parallel(model, mesh, sequence=config.parallel.tensor_sequence)
        apply_sequence_parallel(model, mesh)
        if mesh.pipeline > 1:
            model.keep_layers(own_layers(config, mesh.pipeline_rank))
    return model
