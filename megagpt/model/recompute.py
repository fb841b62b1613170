"""Recompute activations in backward instead of storing them. Applied from outside: no layer knows about it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from megagpt.model.decoder import Decoder
from megagpt.model.layers import AttentionCore
from megagpt.model.offload import run_with_activations_on_host

RecomputeKind = Literal["none", "selective", "full"]


def apply_recompute(model: Decoder, kind: RecomputeKind, *, offload: bool = False) -> None:
    """Choose what backward recomputes: nothing, the attention core of each block, or whole blocks.

    With `offload`, what is kept of each block waits in host memory; of a block that is recomputed, its input.

    It replaces what was chosen before. Parameter names, loss and gradients stay as they are, bit for bit: dropout
    draws the same numbers again. Always the non-reentrant checkpoint: the reentrant one cuts hooks and
    needs inputs that require gradients.

    Source: Chen et al. 2016 (full); Korthikanti et al. 2022, section 5 (selective).
    """
    for module in model.modules():
        if isinstance(vars(module).get("forward"), partial):
            del module.forward  # the class's own forward comes back
    for module in _recomputed(model, kind):
        # An attribute of the instance, not a wrapping module: a wrapper would change every parameter's name.
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    if offload:
        for block in model.blocks:
            block.forward = partial(run_with_activations_on_host, block, block.forward)


def _recomputed(model: Decoder, kind: RecomputeKind) -> Iterator[nn.Module]:
    if kind == "full":
        yield from model.blocks
    elif kind == "selective":
        yield from (module for module in model.modules() if isinstance(module, AttentionCore))
