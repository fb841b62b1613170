"""An all-reduce over every process of every host, timed; torch alone. `doctor` sends this file over ssh.

`python - '{"first_rank": 0, "slots": 8, "world_size": 16, "address": ..., "port": ..., "seconds": 60}' < all_reduce.py`
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from statistics import median
from typing import Any

MARK = "MEGAGPT-DOCTOR "
"""Begins our line, as in probe.py: this file is sent alone."""

SMALL_BYTES, LARGE_BYTES = 8, {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
"""What is summed: the small one shows latency, the large one bandwidth."""

REPEATS = {"cuda": 20, "cpu": 5}


def main(argument: str) -> int:
    """Start one process a slot; 0 where all of them succeed."""
    asked = json.loads(argument)
    children = []
    for local_rank in range(asked["slots"]):
        child = os.fork()  # before torch is imported: nothing of its threads or of CUDA is forked
        if child == 0:
            os._exit(run(asked, local_rank))
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def run(asked: dict[str, Any], local_rank: int) -> int:
    """One process. Whatever happens, it ends by itself: the far end of a cut ssh connection is not told."""
    rank = asked["first_rank"] + local_rank
    signal.alarm(int(asked["seconds"]) + 15)
    try:
        measured = measure(asked, rank, local_rank)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
        tell(rank, "failed", error=f"{type(error).__name__}: {error}".strip().splitlines()[0])
        return 1
    tell(rank, "done", **measured)
    return 0


def tell(rank: int, phase: str, **more: Any) -> None:
    """One line, at once and whole."""
    os.write(1, (MARK + json.dumps({"rank": rank, "phase": phase, **more}) + "\n").encode())


def measure(asked: dict[str, Any], rank: int, local_rank: int) -> dict[str, Any]:
    """Join, sum, and time it. Latency: of 8 bytes. Bus bandwidth: size / time x 2 (n - 1) / n.

    Source: nccl-tests, doc/PERFORMANCE.md.
    """
    import torch
    import torch.distributed as dist

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    tell(rank, "started")
    n = asked["world_size"]
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"tcp://{asked['address']}:{asked['port']}",
        rank=rank,
        world_size=n,
        timeout=timedelta(seconds=asked["seconds"]),
    )
    tell(rank, "joined")
    check = torch.full((1,), float(rank + 1), device=device)
    dist.all_reduce(check)
    if float(check) != n * (n + 1) / 2:
        raise ArithmeticError(f"the sum of 1 to {n} came out as {float(check)}")
    latency = timed(torch.zeros(SMALL_BYTES // 4, device=device), REPEATS[kind])
    large = timed(torch.zeros(LARGE_BYTES[kind] // 4, device=device), REPEATS[kind])
    dist.destroy_process_group()
    return {
        "backend": "nccl" if kind == "cuda" else "gloo",
        "latency_seconds": latency,
        "bus_bytes_per_second": LARGE_BYTES[kind] / large * 2 * (n - 1) / n,
    }


def timed(tensor: Any, repeats: int) -> float:
    """Median seconds of one all-reduce."""
    import torch
    import torch.distributed as dist

    seconds = []
    for _ in range(repeats + 2):
        started_at = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_at)
    return median(seconds[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
