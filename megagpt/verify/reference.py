"""The same run in one process of plain PyTorch: no DeepSpeed, no engine, no layout.

It shares with a run the model as one process has it, its initial weights, and which sample stands where; nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from megagpt.config.schema import OptimSection, TrainingRun
from megagpt.data.mixture import open_mixture
from megagpt.model.build import build_model
from megagpt.model.decoder import Decoder
from megagpt.model.init import init_weights
from megagpt.train.schedule import lr_schedule
from megagpt.verify.tokens import fingerprint

IntArray = npt.NDArray[Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Course:
    """What training gave, step by step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    """Before clipping."""
    samples: list[list[str]] = field(default_factory=list)
    """Fingerprints of each step's samples, in their order."""
    initial: dict[str, Tensor] = field(default_factory=dict)
    """Weights before the first step, by name; a tied head once."""
    first: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """`weight`, `exp_avg` and `exp_avg_sq` after the first step, by name."""
    first_lr: float = 0.0
    """Learning rate of the first step."""


def reference_course(config: TrainingRun, after_step: Callable[[int], None] = lambda _: None) -> Course:
    """Train: mean loss over all target tokens of a batch, micro-batch by micro-batch; backward, clip, AdamW.

    In bf16 the model computes with weights that are rounded from fp32 ones before each step, and the optimizer works on
    those. Source: Micikevicius et al. 2018, section 3.1 (master weights).
    """
    model = build_model(config.model)
    init_weights(model, config.run.seed)
    dtype = DTYPES[config.train.dtype]
    master = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    model = model.to(dtype)
    model.reset_buffers()
    adamw = _adamw(master, config.optim)
    schedule = lr_schedule(config.optim, config.train.max_steps)
    mixture = open_mixture(config.data.train, config.model.max_seq_len, config.run.seed)
    batch = config.train.global_batch_size
    course = Course(initial={name: value.detach().clone() for name, value in master.items()}, first_lr=schedule(0))
    for step in range(config.train.max_steps):
        numbers = range(step * batch, (step + 1) * batch)
        windows = np.stack([mixture.sample(number) for number in numbers])
        course.samples.append([fingerprint(window[:-1]) for window in windows])
        # Without isolated documents a window is one text.
        of_texts = np.stack([mixture.documents(number) for number in numbers]) * config.data.isolate_documents
        loss, gradients = _gradients(model, master, _texts(windows, of_texts), config.train.micro_batch_size)
        course.losses.append(loss)
        course.grad_norms.append(_clip(gradients, config.optim.grad_clip))
        for name, value in master.items():
            value.grad = gradients[name]
        for group in adamw.param_groups:
            group["lr"] = schedule(step)
        adamw.step()
        if step == 0:
            course.first = {name: _state(adamw, value) for name, value in master.items()}
        after_step(step)
    return course


def _adamw(master: dict[str, Tensor], optim: OptimSection) -> torch.optim.AdamW:
    """Matrices decay; norms, biases and learned positions do not."""
    still = [name for name in master if "norm" in name or name.endswith(".bias") or "positions" in name]
    groups = [
        {"params": [value for name, value in master.items() if name not in still], "weight_decay": optim.weight_decay},
        {"params": [master[name] for name in still], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps)


def _texts(windows: IntArray, of_texts: IntArray) -> list[list[Tensor]]:
    """For each window its texts of two tokens or more, as (n,) tokens: each is read by itself."""
    found = []
    for window, numbers in zip(windows, of_texts, strict=True):
        texts = [torch.from_numpy(window[numbers == number]) for number in np.unique(numbers)]
        found.append([text for text in texts if len(text) > 1])
    return found


def _gradients(
    model: Decoder, master: dict[str, Tensor], windows: list[list[Tensor]], micro_batch_size: int
) -> tuple[float, dict[str, Tensor]]:
    """Mean loss in nats over all texts' targets, and each parameter's gradient, added up in fp32."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(master[name])
    gradients = {name: torch.zeros_like(value) for name, value in master.items()}
    n_targets = sum(len(text) - 1 for texts in windows for text in texts)
    total = 0.0
    for start in range(0, len(windows), micro_batch_size):
        model.zero_grad()
        nll = _nll(model, windows[start : start + micro_batch_size])
        (nll / n_targets).backward()  # type: ignore[no-untyped-call]
        total += nll.item()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                gradients[name] += parameter.grad.float()
    return total / n_targets, gradients


def _nll(model: Decoder, windows: list[list[Tensor]]) -> Tensor:
    """Summed over texts; those of the same length are run together, as the rows of a micro-batch are."""
    by_length: dict[int, list[Tensor]] = {}
    for text in (text for texts in windows for text in texts):
        by_length.setdefault(len(text), []).append(text)
    total = torch.zeros(())
    for texts in by_length.values():
        tokens = torch.stack(texts)
        logits = model(tokens[:, :-1]).float().flatten(0, 1)
        total = total + F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    return total


def _clip(gradients: dict[str, Tensor], largest: float) -> float:
    """The global L2 norm; gradients are scaled down to `largest` where it is above, in place. 0 means no clipping."""
    norm = torch.stack([gradient.double().square().sum() for gradient in gradients.values()]).sum().sqrt().item()
    if largest and norm > largest:
        for gradient in gradients.values():
            gradient.mul_(largest / norm)
    return norm


def _state(adamw: torch.optim.AdamW, value: Tensor) -> dict[str, Tensor]:
    state = adamw.state[value]
    return {
        "weight": value.detach().clone(),
        "exp_avg": state["exp_avg"].clone(),
        "exp_avg_sq": state["exp_avg_sq"].clone(),
    }
