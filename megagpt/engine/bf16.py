"""DeepSpeed 0.19.8's bf16 optimizer without the copies that its result does not need.

For every step `BF16_Optimizer` clears its fp32 gradients twice, turns each bf16 gradient into a temporary fp32 one,
adds that to the zeros, and scales parameter by parameter to clip; and where one process reduces alone, the engine
packs all gradients into a buffer, rounds them to bf16 there, sends it nowhere and unpacks it. But for that rounding, of
one process alone, every bit is the same without: tests/distributed/test_parity.py. What it saves, `megagpt bench train`
shows.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor


def spare_copies(engine: Any, data_parallel: int) -> None:
    """Replace methods of a DeepSpeed engine and of its `BF16_Optimizer`; of another optimizer, nothing.

    Args:
        engine: as `deepspeed.initialize` gives it.
        data_parallel: processes over which it reduces gradients.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        return
    optimizer.get_grads_for_norm = MethodType(_gradients_for_norm, optimizer)
    if data_parallel == 1:
        engine.buffered_allreduce_fallback = _reduce_nothing
    if optimizer.immediate_grad_update or optimizer.has_moe_layers or optimizer.grad_acc_dtype != torch.float32:
        return  # by `parallel.extra`
    optimizer.update_hp_grads = MethodType(_accumulate, optimizer)
    optimizer.clear_hp_grads = MethodType(_forget_gradients, optimizer)


def _reduce_nothing(grads: Any = None, elements_per_buffer: int = 0) -> None:
    """The mean over one process."""


@torch.no_grad()
def _accumulate(optimizer: Any, clear_lp_grads: bool = False) -> None:  # noqa: FBT001, FBT002 - theirs
    """bf16 gradients of a micro-batch into the fp32 ones: the first of a step is copied, later ones are added."""
    for group, totals, has_gradient in zip(
        optimizer.bf16_groups,
        optimizer.fp32_groups_gradients,
        optimizer.fp32_groups_has_gradients,
        strict=True,
    ):
        first: tuple[list[Tensor], list[Tensor]] = ([], [])
        later: tuple[list[Tensor], list[Tensor]] = ([], [])
        without: list[Tensor] = []
        for index, (parameter, total) in enumerate(zip(group, totals, strict=True)):
            if parameter.grad is not None:
                totals_and_gradients = later if has_gradient[index] else first
                totals_and_gradients[0].append(total)
                totals_and_gradients[1].append(parameter.grad.view_as(total))
                parameter._hp_grad = total
                has_gradient[index] = True
            elif not has_gradient[index]:
                without.append(total)  # it still holds the last step's
        if first[0]:
            torch._foreach_copy_(*first)
        if later[0]:
            torch._foreach_add_(*later)
        if without:
            torch._foreach_zero_(without)
        if clear_lp_grads:
            torch._foreach_zero_(first[1] + later[1])


def _forget_gradients(optimizer: Any) -> None:
    """What the fp32 gradients hold means nothing any more; the next micro-batch overwrites it."""
    for has_gradient in optimizer.fp32_groups_has_gradients:
        has_gradient[:] = [False] * len(has_gradient)


def _gradients_for_norm(optimizer: Any, for_clipping: bool = False) -> Any:  # noqa: FBT001, FBT002 - theirs
    """One tensor a parameter group to clip. The norm stays one a parameter: of 10^8 fp32 numbers it would be 1% off.

    Where a process counts none of its parameters (a stage with nothing but a tied head, on all but the first of a
    tensor group), DeepSpeed fails on the empty list: one zero stands for it.
    """
    if for_clipping:
        return optimizer.fp32_groups_actual_gradients_flat
    counted, of_experts = type(optimizer).get_grads_for_norm(optimizer)
    return counted or [torch.zeros(1, device=optimizer.fp32_groups_actual_gradients_flat[0].device)], of_experts
