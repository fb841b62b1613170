"""What DeepSpeed 0.19.8 does wrong without saying so, put right. Each function names the test that shows the need."""

from __future__ import annotations

from types import MethodType
from typing import Any


def unscale_with_the_scale_of_the_step(optimizer: Any) -> None:
    """fp16: divide gradients by the loss scale that they were multiplied with.

    DeepSpeed's ZeRO optimizers grow the scale first and divide by the grown one, so that every `loss_scale_window`
    steps the update is made with half the gradient (and ZeRO-3 reports half the norm). The growth is put off until the
    update is done. An overflow still lowers the scale at once: nothing is divided then.

    Needed until tests/distributed/test_fp16.py passes without it.
    """
    update_scale, step = optimizer._update_scale, optimizer.step

    def update_on_overflow(self: Any, has_overflow: bool = False) -> None:  # noqa: ARG001, FBT001, FBT002 - theirs
        if has_overflow:
            update_scale(has_overflow)

    def step_then_grow(self: Any, closure: Any = None) -> None:
        step(closure)
        if not self.overflow:
            update_scale(has_overflow=False)

    optimizer._update_scale = MethodType(update_on_overflow, optimizer)
    optimizer.step = MethodType(step_then_grow, optimizer)
