"""The last word before an update: the global gradient norm is judged, and a step that is refused changes nothing.

DeepSpeed drops a step whose gradients overflowed, and clears what it had gathered for it, on all processes alike. Each
of its optimizers takes the norm at another place; there it is made to ask, and a step that is refused goes the way of
an overflow. Needed because under ZeRO-0 DeepSpeed updates with gradients that are not finite, and because a step whose
loss or norm is out of bounds is no overflow to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import (
    clip_tensors_by_global_norm,
    combine_grad_norm_groups,
    get_global_norm_of_tensors,
    is_invalid_grad_norm,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megagpt.engine.sharded_muon import ShardedMuon

Judge = Callable[[float], bool]
"""Global gradient norm before clipping, NaN where it is not finite -> whether the update is made."""


class Gate:
    """Between the gradients of a step and its update. One for an engine, installed after every other correction.

    Args:
        optimizer: DeepSpeed's.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._judge: Judge = math.isfinite
        self.norm: float | None = None
        """Of the step in hand; None where DeepSpeed saw an overflow before it took the norm."""
        self.refused = False
        """Whether this step's update was refused."""
        _install(optimizer, self)

    def open(self, judge: Judge) -> None:
        """A step begins; its norm will be judged by this."""
        self._judge = judge
        self.norm, self.refused = None, False

    def passes(self, norm: float) -> bool:
        """Judge a step, once."""
        self.norm = norm if math.isfinite(norm) and norm >= 0 else math.nan
        self.refused = not self._judge(self.norm)
        return not self.refused

    def passes_scaled(self, norm: Any) -> bool:
        """Judge a norm that fp16's loss scale has multiplied; -1 and inf are DeepSpeed's words for not finite."""
        scale = float(self._optimizer.loss_scaler.loss_scale)
        return self.passes(math.nan if is_invalid_grad_norm(norm) else float(norm) / scale)

    def close(self) -> None:
        """The step is over: forget its gradients.

        Where the optimizer is on the host, DeepSpeed 0.19.8 keeps the sums of a dropped step and adds the next step's
        to them. Needed until tests/distributed/test_refusals.py passes without it.
        """
        if getattr(self._optimizer, "overflow", False) and getattr(self._optimizer, "cpu_offload", False):
            self._optimizer.averaged_gradients = dict.fromkeys(self._optimizer.averaged_gradients)


def _install(optimizer: Any, gate: Gate) -> None:
    if isinstance(optimizer, ShardedMuon):
        optimizer.passes = gate.passes
    elif isinstance(optimizer, BF16_Optimizer):
        optimizer.step = partial(_bf16_step, optimizer, gate)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _install_zero_3(optimizer, gate)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        _install_zero_1_and_2(optimizer, gate)
    else:
        _install_without_zero(optimizer, gate)


def _install_without_zero(optimizer: Any, gate: Gate) -> None:
    """ZeRO-0: the engine takes the norm and asks before it lets DeepSpeed step."""
    step = optimizer.step

    def guarded(self: Any, closure: Any = None) -> None:
        self.overflow = gate.refused  # DeepSpeed looks here whether the update was made
        if not gate.refused:
            step(closure)

    optimizer.step = MethodType(guarded, optimizer)


def _install_zero_1_and_2(optimizer: Any, gate: Gate) -> None:
    take_norm = optimizer.scaled_global_norm

    def judged(self: Any, norm_type: int = 2) -> Any:
        norm = take_norm(norm_type)
        self.overflow = not gate.passes_scaled(norm)
        return norm

    optimizer.scaled_global_norm = MethodType(judged, optimizer)
    _keep_fixed_scale_silent(optimizer)


def _install_zero_3(optimizer: Any, gate: Gate) -> None:
    take_norms = optimizer._get_norm_groups

    def judged(self: Any) -> Any:
        norms = take_norms()
        self.overflow = not gate.passes_scaled(combine_grad_norm_groups(norms))
        return norms

    optimizer._get_norm_groups = MethodType(judged, optimizer)
    _keep_fixed_scale_silent(optimizer)


def _keep_fixed_scale_silent(optimizer: Any) -> None:
    """A scale that does not move only prints that there was an overflow, whatever there was."""
    if not optimizer.loss_scaler.dynamic:
        optimizer._update_scale = lambda has_overflow=False: None  # noqa: ARG005 - theirs


@torch.no_grad()
def _bf16_step(optimizer: Any, gate: Gate, closure: Any = None) -> None:  # noqa: ARG001 - torch's signature
    """One update. Source: DeepSpeed 0.19.8, `BF16_Optimizer.step`, without experts and DeepSpeed's Muon."""
    counted, _ = optimizer.get_grads_for_norm()
    norm = get_global_norm_of_tensors(input_tensors=counted, mpu=optimizer.mpu, norm_type=optimizer.norm_type)
    optimizer.overflow = not gate.passes(math.nan if is_invalid_grad_norm(norm) else float(norm))
    optimizer._global_grad_norm = norm
    if optimizer.overflow:
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
        return
    if optimizer.clip_grad > 0.0:
        clip_tensors_by_global_norm(
            input_tensors=optimizer.get_grads_for_norm(for_clipping=True),
            max_norm=optimizer.clip_grad,
            global_norm=norm,
            mpu=optimizer.mpu,
        )
    partitions = optimizer.fp32_groups_flat_partition
    for weights, gradients in zip(partitions, optimizer.fp32_groups_gradient_flat_partition, strict=True):
        weights.grad = gradients.to(weights.dtype)
    optimizer.optimizer.step()
    if optimizer.grad_acc_dtype is not torch.float32:
        for weights in partitions:
            weights.grad = None
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()
    optimizer.clear_hp_grads()
