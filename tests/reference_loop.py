"""The oracle: one process, one batch, plain PyTorch. Every layout must give its losses, norms and weights.

It shares with the product the model class and which samples a step holds, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megagpt.config.schema import TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.model.build import build_model
from megagpt.model.init import init_weights
from tests.reference_muon import PlainMuon, is_hidden


@dataclass
class Curve:
    """What training shows to the outside."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    first_gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first step, clipped."""


def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of (b, T + 1) tokens, in nats."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def reference_run(
    config: TrainingRun,
    steps: int,
    dtype: torch.dtype = torch.float32,
    loss_of: Callable[[nn.Module, Tensor], Tensor] = mean_loss,
) -> Curve:
    """Train in the given type from the initial weights."""
    model = build_model(config.model)
    init_weights(model, config.run.seed)
    model = model.to(dtype)
    model.reset_buffers()
    optim, batch = config.optim, config.train.global_batch_size
    mixture = open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)
    named = dict(model.named_parameters())
    hidden = {n: p for n, p in named.items() if optim.name == "muon" and is_hidden(n, p)}
    muon = PlainMuon(hidden, config)
    still = [name for name in named if "norm" in name or name.endswith(".bias") or "positions" in name]
    decayed = {
        "params": [p for name, p in named.items() if name not in (*still, *hidden)],
        "weight_decay": optim.weight_decay,
    }
    others = {"params": [named[name] for name in still], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([decayed, others], lr=0.0, betas=optim.betas, eps=optim.eps)
    curve = Curve()
    for step in range(steps):
        tokens = torch.from_numpy(np.stack([mixture.sample(step * batch + row) for row in range(batch)]))
        loss = loss_of(model, tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        if step == 0:
            curve.first_gradients = {name: p.grad.clone() for name, p in named.items()}
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, config)
        adamw.step()
        muon.step(learning_rate(step, config))
        adamw.zero_grad()
        curve.losses.append(loss.item())
        curve.grad_norms.append(norm.item())
    curve.weights = {name: p.detach().clone() for name, p in named.items()}
    return curve


def learning_rate(step: int, config: TrainingRun) -> float:
    """Linear warm-up, then half a cosine to a tenth at the last step: nanoGPT's."""
    warmup, last = config.optim.warmup_steps, config.train.max_steps - 1
    if step < warmup:
        return config.optim.lr * (step + 1) / warmup
    low = 0.1 * config.optim.lr
    return low + 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (last - warmup))) * (config.optim.lr - low)
