"""Our engine, and the plain PyTorch loop that it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

from megagpt.bench.loop import inputs_and_targets
from megagpt.config.schema import TrainingRun
from megagpt.engine.engine import init_distributed
from megagpt.model.batch import TokenBatch
from megagpt.parallel.mesh import make_mesh
from megagpt.parallel.plan import plan_batches
from megagpt.train.build import build_engine, build_share, compile_and_recompute
from megagpt.train.optim import parameter_groups


class OurLoop:
    """`Engine.train_step` as `launch/pretrain.py` calls it, without reading data, metrics and saving."""

    def __init__(self, config: TrainingRun, device: str) -> None:
        device_type: Literal["cuda", "cpu"] = "cuda" if device == "cuda" else "cpu"
        init_distributed(timedelta(minutes=5), device_type=device_type)
        mesh = make_mesh(0, 1, 0, torch.device("cuda:0" if device == "cuda" else "cpu"), config.parallel)
        self._engine = build_engine(config, plan_batches(config, 1), mesh)
        self._lr = config.optim.lr

    def step(self, windows: Sequence[Tensor]) -> float:
        """As `Loop.step`."""
        return self._engine.train_step([TokenBatch.of_windows(each) for each in windows], self._lr).loss


class PlainLoop:
    """Our model, weights, loss, blocks and parameter groups, in plain PyTorch.

    What DeepSpeed's ZeRO-1 does on one process, said in a dozen lines: bf16 weights and activations, gradients added up
    in fp32, the global norm clipped, fused AdamW on fp32 master weights, and the bf16 weights taken from them. It
    waits once a step for the loss, as every training loop that can stop at a loss which is not finite.
    """

    def __init__(self, config: TrainingRun, device: str) -> None:
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.train.dtype]
        self._device = device
        self._clip = config.optim.grad_clip
        model = build_share(config, make_mesh(0, 1, 0, torch.device(device), config.parallel))
        self._model = model.to(device=device, dtype=dtype).train()
        compile_and_recompute(self._model, config)
        self._weights: list[Tensor] = list(self._model.parameters())
        self._masters: list[Tensor] = [torch.nn.Parameter(weight.detach().float()) for weight in self._weights]
        master_of = dict(zip(self._weights, self._masters, strict=True))
        groups: list[dict[str, Any]] = parameter_groups(self._model, config.optim.weight_decay)
        for group in groups:
            group["params"] = [master_of[weight] for weight in group["params"]]
        self._optimizer = torch.optim.AdamW(
            groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps, fused=True
        )

    def step(self, windows: Sequence[Tensor]) -> float:
        """As `Loop.step`."""
        n_targets = sum(each.shape[0] * (each.shape[1] - 1) for each in windows)
        total = torch.zeros((), device=self._device)
        for each in windows:
            inputs, targets = inputs_and_targets(each, self._device)
            loss = self._model.nll(self._model(inputs), targets) / n_targets
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            self._accumulate()
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._masters, self._clip)
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self._masters)
        self._optimizer.zero_grad()
        return float(total)

    def _accumulate(self) -> None:
        for weight, master in zip(self._weights, self._masters, strict=True):
            assert weight.grad is not None  # noqa: S101 - every parameter is used
            gradient = weight.grad.float()
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            weight.grad = None
