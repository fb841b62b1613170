"""ZeRO-3: weights are made, given their initial values and cut one parameter after the other.

At no time does a process hold more than its part of the model and one whole parameter.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn

from megagpt.model.decoder import Decoder
from megagpt.model.init import initial_weights
from megagpt.parallel.mesh import Mesh


def fill_in_parts(model: Decoder, seed: int, dtype: torch.dtype, settings: dict[str, Any], mesh: Mesh) -> None:
    """Give every parameter its initial value, and keep this process's part of it.

    Every process of the data axis makes the same value, whole, and throws away what is not its own. Parameters stay
    the same objects: optimizer groups and hooks that know them stay right.

    Args:
        model: from `hollow`.
        seed: of the run.
        dtype: of weights in forward and backward.
        settings: the whole of DeepSpeed's configuration.
        mesh: this process's place.
    """
    first: Any = None
    for parameter, value in initial_weights(model, seed):
        parameter.data = value.to(dtype)
        if first is None:
            # Reads the settings and keeps, with the parameter, who shares it; the others are put beside it.
            group = mesh.groups.zero if mesh.groups is not None else None
            one = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=one, data_parallel_group=group, config_dict_or_path=settings, mpu=mesh.mpu)
            first = parameter
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
    for module in model.modules():  # DeepSpeed moves no buffers of a model that is cut already
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(mesh.device))


def hollow(model: Decoder) -> Decoder:
    """A model from the meta device whose parameters have shapes and a place on the CPU, but no memory behind them."""

    def without_memory(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, nn.Parameter):
            return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        return torch.empty_like(tensor, device="cpu")

    with torch.no_grad():
        model = model._apply(without_memory)
    model.reset_buffers()
    return model
