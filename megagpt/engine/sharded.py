"""ZeRO-3: weights are made, given their values and cut one parameter after the other.

At no time does a process hold more than its part of the model and one whole parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from megagpt.engine.live import GatheredDecoder
from megagpt.model.decoder import Decoder
from megagpt.parallel.mesh import Mesh

_SECTIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def cut_for_evaluation(
    model: Decoder, values: Iterable[tuple[nn.Parameter, Tensor]], dtype: torch.dtype, mesh: Mesh
) -> GatheredDecoder:
    """A model that only answers, each weight cut over the data axis, in evaluation mode.

    Args:
        model: from `hollow`.
        values: as for `fill_in_parts`.
        dtype: of the weights.
        mesh: this process's place.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": sys.maxsize,
        "zero_optimization": {"stage": 3},
    }
    if dtype in _SECTIONS:
        settings |= {_SECTIONS[dtype]: {"enabled": True}, "data_types": {"buffer_dtype": _SECTIONS[dtype]}}
    fill_in_parts(model, values, dtype, settings, mesh)
    deepspeed.initialize(model=model, config=settings, mpu=mesh.mpu, dist_init_required=False)
    return GatheredDecoder(model.eval(), mesh)


def fill_in_parts(
    model: Decoder,
    values: Iterable[tuple[nn.Parameter, Tensor]],
    dtype: torch.dtype,
    settings: dict[str, Any],
    mesh: Mesh,
) -> None:
    """Give every parameter its value, and keep this process's part of it.

    Every process of the data axis makes the same value, whole, and throws away what is not its own. Parameters stay
    the same objects: optimizer groups and hooks that know them stay right.

    Args:
        model: from `hollow`.
        values: of every parameter once, whole but for tensor parallelism; made one at a time.
        dtype: of weights in forward and backward.
        settings: the whole of DeepSpeed's configuration.
        mesh: this process's place.
    """
    first: Any = None
    for parameter, value in values:
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
