"""The groups of parameters that an optimizer is given."""

from __future__ import annotations

from typing import Any

from torch import nn

from megagpt.model.decay import decays


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups: the parameters that decay, then the others."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
