"""What DeepSpeed 0.19.8 does wrong without saying so, put right. Each function names the test that shows the need."""

from __future__ import annotations

from pathlib import Path
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


def unname_shared_buffers() -> None:
    """CPU: give the shared memory of DeepSpeed's all-reduce back when the last process ends, however it ends.

    Each rank makes a file of 66 MiB in /dev/shm and never removes it: every run on another port leaves that much of the
    machine's memory behind. Called once all ranks have mapped all files: a name is not needed after that.

    Needed until tests/distributed/test_shared_memory.py passes without it.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not Linux
        return
    for line in maps.read_text().splitlines():
        _, _, path = line.partition("/dev/shm/deepspeed_allreduce_buffer")
        if path and not path.endswith(" (deleted)"):
            Path(f"/dev/shm/deepspeed_allreduce_buffer{path}").unlink(missing_ok=True)
