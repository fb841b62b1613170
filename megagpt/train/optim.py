"""Which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

_NO_DECAY = ("positions.weight",)
"""Learned positions, though a matrix, are offsets like biases."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: matrices decay; norms, biases and learned positions do not.

    Source: Brown et al. 2020, appendix B, as nanoGPT and Megatron-LM apply it (dimension 2 and above decays).
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [p for name, p in named if p.dim() >= 2 and not name.endswith(_NO_DECAY)]
    others = [p for name, p in named if p.dim() < 2 or name.endswith(_NO_DECAY)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
