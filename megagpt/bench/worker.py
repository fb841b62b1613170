"""One loop in a process of its own: `python -m megagpt.bench.worker FD`, spoken to in lines of JSON.

First comes what to build; then, for as long as lines come, how many steps to take, or how many large products. Each is
answered with what they took, through the file descriptor FD.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch
from torch import Tensor

from megagpt.bench.litgpt import LitLoop
from megagpt.bench.loop import Loop
from megagpt.bench.nanogpt import NanoLoop
from megagpt.bench.ours import OurLoop, PlainLoop
from megagpt.config.schema import TrainingRun
from megagpt.errors import MegaGPTError
from megagpt.parallel.plan import plan_batches

LOOPS: dict[str, Callable[[TrainingRun, str], Loop]] = {
    "ours": OurLoop,
    "plain": PlainLoop,
    "nanogpt": NanoLoop,
    "litgpt": LitLoop,
}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SQUARE = {"cuda": 8192, "cpu": 1536}
"""Device type -> rows and columns of the product that shows what the device reaches at best."""


def serve(requests: TextIO, answers: TextIO) -> None:
    """Build a loop, then take steps as asked, until the requests end."""
    first = json.loads(requests.readline())
    config = TrainingRun.model_validate_json(first["config"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if first["threads"] is not None:
        torch.set_num_threads(first["threads"])

    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        loop = LOOPS[first["loop"]](config, device)
        answer(
            device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
            threads=torch.get_num_threads(),
        )
        data = _windows(config)
        for question in map(json.loads, requests):
            if "steps" in question:
                answer(**_turn(loop, data, question["steps"], device))
            else:
                answer(tflops=_product_tflops(device, _DTYPES[config.train.dtype], question["products"]))
    except (MegaGPTError, torch.OutOfMemoryError) as error:
        answer(error=str(error))


def _turn(loop: Loop, data: Iterator[list[Tensor]], steps: int, device: str) -> dict[str, Any]:
    """Take the steps, wait for the device, and give back memory that another process may want."""
    batches = [next(data) for _ in range(steps)]
    gc.collect()  # not in the middle of a step
    gc.disable()
    if device == "cuda":
        loop.step(next(data))  # the memory that was given back is asked for again
        torch.cuda.synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    for windows in batches:
        loss = loop.step(windows)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    gc.enable()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
    return {
        "step_seconds": seconds / steps,
        "step_cpu_seconds": cpu_seconds / steps,
        "loss": float(loss),
        "peak_bytes": peak,
    }


def _windows(config: TrainingRun) -> Iterator[list[Tensor]]:
    """Micro-batches of random tokens for one step after another, the same in every process."""
    generator = torch.Generator().manual_seed(config.run.seed)
    plan = plan_batches(config, 1)
    shape = (plan.micro_batch_size, plan.seq_len + 1)
    while True:
        yield [torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(plan.grad_accum_steps)]


def _product_tflops(device: str, dtype: torch.dtype, times: int) -> float:
    """What a square product reaches, the best of some: the ceiling of any MFU on this device, as it is now."""
    n = _SQUARE[device]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(times):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        c = a @ b
        float(c[0, 0])  # waits
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best / 1e12


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as channel:
        serve(sys.stdin, channel)
    os._exit(0)  # no teardown of process groups: it can abort, and everything is said
