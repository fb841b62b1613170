"""`megagpt bench checkpoint`: what an asynchronous save costs training, and what its checksums cost the save."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from rich.console import Console
from torch import Tensor

from megagpt.checkpoint import fsio
from megagpt.checkpoint.save import Identity
from megagpt.checkpoint.saver import Saver
from megagpt.checkpoint.store import CheckpointStore
from megagpt.checkpoint.tensors import KINDS, RankFile, TensorSlice
from megagpt.config.schema import CheckpointSection
from megagpt.parallel.mesh import Mesh

MOST_BLOCKED = 1.5
"""Times the copy to host memory that a save may block training."""
MOST_CHECKSUM = 0.05
"""Share of a save that its checksums may take."""


@dataclass(frozen=True, slots=True)
class SaveCost:
    """Medians over the rounds, seconds."""

    n_bytes: int
    rounds: int
    copy_seconds: float
    """To copy the state into host memory that is there already, tensor by tensor."""
    blocked_seconds: float
    """For which an asynchronous save keeps training waiting."""
    save_seconds: float
    """From its begin until the checkpoint is durable and visible."""
    checksum_seconds: float
    """To checksum the file while it is written, by the code that writes it: of processor time, because all of it is
    computation, and another program's share of the processor is not its cost."""

    @property
    def blocked_ratio(self) -> float:
        """Time blocked / time of the copy."""
        return self.blocked_seconds / self.copy_seconds

    @property
    def checksum_share(self) -> float:
        """Checksums / whole save."""
        return self.checksum_seconds / self.save_seconds

    def to_json(self) -> str:
        """All figures."""
        more = {"blocked_ratio": self.blocked_ratio, "checksum_share": self.checksum_share}
        return json.dumps(asdict(self) | more, indent=1) + "\n"


def bench_checkpoint(folder: Path, n_bytes: int, rounds: int) -> SaveCost:
    """Save a state of `n_bytes` below `folder` again and again, one process, on the GPU if there is one.

    Everything that is written is removed.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    slices = _state(n_bytes, device)
    tensors = [values for part in slices for values in part.values.values()]
    host = [torch.zeros(values.shape, pin_memory=device.type == "cuda") for values in tensors]
    found: dict[str, list[float]] = {"copy": [], "blocked": [], "save": [], "checksum": []}
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench_checkpoint_") as where:
        store = CheckpointStore(Path(where) / "checkpoints")
        mesh = Mesh(rank=0, world_size=1, local_rank=0, device=device)
        settings = CheckpointSection(keep_last=1)
        with Saver(store, mesh, settings, _IDENTITY, lambda: slices, _Silent()) as saver:
            for step in range(1, rounds + 2):  # the first round warms up
                found["copy"].append(_seconds(lambda: _copy(tensors, host), device))
                started_at = time.perf_counter()
                found["blocked"].append(_seconds(lambda step=step: saver.save({"step": step}), device))  # type: ignore[misc]
                saver.settle()
                found["save"].append(time.perf_counter() - started_at)
                found["checksum"].append(_checksum_seconds(Path(where) / "file", host))
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    return SaveCost(
        n_bytes=RankFile.of(slices).n_bytes,
        rounds=rounds,
        copy_seconds=medians["copy"],
        blocked_seconds=medians["blocked"],
        save_seconds=medians["save"],
        checksum_seconds=medians["checksum"],
    )


def show(cost: SaveCost, console: Console) -> None:
    """Print the figures, and what they should be."""
    console.print(
        f"state               {cost.n_bytes / 1e9:.3g} GB, median of {cost.rounds} saves\n"
        f"copy to host memory {cost.copy_seconds:.3f} s\n"
        f"training waits      {cost.blocked_seconds:.3f} s = {cost.blocked_ratio:.2f} x the copy "
        f"(should be below {MOST_BLOCKED:g})\n"
        f"whole save          {cost.save_seconds:.3f} s = {cost.n_bytes / cost.save_seconds / 1e9:.2f} GB/s\n"
        f"checksums           {cost.checksum_seconds:.3f} s = {cost.checksum_share:.1%} of the save "
        f"(should be below {MOST_CHECKSUM:.0%})",
        highlight=False,
    )


_IDENTITY = Identity({"model": {}}, None, None, (), {})


class _Silent:
    def say(self, message: str) -> None:
        """Nothing."""

    def event(self, name: str, step: int, **details: Any) -> None:
        """A save that fails ends the measurement."""
        if "cause" in details:
            raise OSError(f"{name} at step {step}: {details['cause']}")

    def make_durable(self) -> None:
        """There are no rows."""


def _state(n_bytes: int, device: torch.device) -> list[TensorSlice]:
    """An embedding of a quarter, blocks of four matrices and four vectors."""
    numel, width = n_bytes // (4 * len(KINDS)), 1024
    block = (3 * width**2, width**2, 4 * width**2, 4 * width**2, *[width] * 4)
    sizes, left = [numel // 4], numel - numel // 4
    for size in itertools.cycle(block):
        sizes.append(min(size, left))
        left -= sizes[-1]
        if not left:
            break
    generator = torch.Generator(device).manual_seed(0)
    return [
        TensorSlice(
            f"t{i}", (size,), 0, {kind: torch.randn(size, generator=generator, device=device) for kind in KINDS}
        )
        for i, size in enumerate(sizes)
    ]


def _copy(tensors: list[Tensor], host: list[Tensor]) -> None:
    for values, place in zip(tensors, host, strict=True):
        place.copy_(values, non_blocking=True)


def _checksum_seconds(path: Path, host: list[Tensor]) -> float:
    digest = _TimedDigest()
    fsio.write_file(path, (values.numpy().view(np.uint8).data for values in host), digest)
    path.unlink()
    return digest.seconds


class _TimedDigest:
    """A checkpoint's checksum, and the processor time of this thread that it takes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._digest = xxhash.xxh3_128()

    def update(self, piece: memoryview, /) -> None:
        started_at = time.thread_time()
        self._digest.update(piece)
        self.seconds += time.thread_time() - started_at

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started_at = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_at
