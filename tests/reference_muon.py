"""Muon as its papers write it down, for one process: the oracle of tests/reference_loop.py.

Nothing of the product: matrices are taken apart by name, momentum is the papers' sum, the iteration is spelled out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt.config.schema import TrainingRun


def is_hidden(name: str, parameter: Tensor) -> bool:
    return "blocks" in name and parameter.ndim == 2


def parts_of(name: str, config: TrainingRun) -> list[int]:
    """Rows of the matrices that are fused in a weight; [] where it is one."""
    model = config.model
    if "qkv" in name:
        width = model.d_model // model.n_head
        n_kv_head = getattr(model, "n_kv_head", model.n_head)
        return [model.n_head * width, n_kv_head * width, n_kv_head * width]
    if "gate_up" in name:
        return [model.d_ff, model.d_ff]
    return []


def newton_schulz(gradient: Tensor, steps: int) -> Tensor:
    """Jordan et al. 2024, newtonschulz5, in the type that comes in; the smallest norm as in torch.optim.Muon."""
    x = gradient / max(gradient.norm(), 1e-7)
    if len(x) > len(x[0]):
        return newton_schulz(gradient.T, steps).T
    for _ in range(steps):
        xx = x @ x.T
        x = 3.4445 * x + (-4.7750 * xx + 2.0315 * xx @ xx) @ x
    return x


class PlainMuon:
    """M <- mu M + g;  W <- W - lr (0.2 sqrt(max(A, B)) NS(g + mu M) + decay W). Liu et al. 2025, equations 1 to 4."""

    def __init__(self, named: dict[str, Tensor], config: TrainingRun) -> None:
        self.named = named
        self.config = config
        self.momenta = {name: torch.zeros_like(p) for name, p in named.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        optim = self.config.optim
        own_lr = lr * (optim.muon.lr or optim.lr) / optim.lr
        for name, parameter in self.named.items():
            momentum = self.momenta[name]
            momentum.mul_(optim.muon.momentum).add_(parameter.grad)
            wanted = parameter.grad + optim.muon.momentum * momentum if optim.muon.nesterov else momentum
            rows = parts_of(name, self.config) or [len(parameter)]
            updates = []
            for part in wanted.split(rows):
                height, width = part.shape
                rms, spectral = 0.2 * max(height, width) ** 0.5, max(1.0, height / width) ** 0.5
                factor = {"rms": rms, "spectral": spectral}[optim.muon.scale]
                updates.append(factor * newton_schulz(part, optim.muon.ns_steps))
            parameter -= own_lr * (torch.cat(updates) + optim.weight_decay * parameter)
            parameter.grad = None
