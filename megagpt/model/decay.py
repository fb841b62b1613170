"""Which parameters weight decay pulls on."""

from __future__ import annotations

from torch import Tensor

_NO_DECAY = ("positions.weight",)
"""Learned positions, though a matrix, are offsets like biases."""


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices do; norms, biases and learned positions do not.

    Source: Brown et al. 2020, appendix B, as nanoGPT and Megatron-LM apply it (dimension 2 and above decays).
    """
    return parameter.dim() >= 2 and not name.endswith(_NO_DECAY)
