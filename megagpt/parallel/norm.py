"""The global gradient norm of a model whose parameters are cut over a tensor group."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megagpt.model.layout import Shard
from megagpt.parallel.mesh import Mesh


def global_norm(gradients: Iterable[tuple[str, Tensor]], shards: dict[str, Shard], mesh: Mesh) -> float:
    """L2 norm of all gradients, each element of the model counted once; the same on all processes.

    Args:
        gradients: (parameter name, gradient), reduced over the data-parallel processes.
        shards: how parameters are cut, by name.
        mesh: this process's place; all of its tensor group call this.
    """
    whole: list[Tensor] = []
    cut: list[Tensor] = []
    for name, gradient in gradients:
        (cut if name in shards and shards[name].is_cut else whole).append(gradient)
    (cut_squared,) = mesh.sum_over_tensor(float(torch.nn.utils.get_total_norm(cut)) ** 2)
    return math.hypot(math.sqrt(cut_squared), float(torch.nn.utils.get_total_norm(whole)))
