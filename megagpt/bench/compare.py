"""Several loops over the same sizes, turn by turn: who takes how long for a step."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from megagpt.config.schema import GPT2Model, TrainingRun
from megagpt.errors import ConfigError, MegaGPTError
from megagpt.model import flops

OURS = "ours"
PEERS = ("plain", "nanogpt", "litgpt")
"""What our engine can be held against."""

_PRODUCTS = 20
"""Large products of which the fastest tells what the device reaches."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to measure, and how long."""

    config: TrainingRun
    against: tuple[str, ...] = PEERS
    rounds: int = 5
    """Turns of each loop."""
    steps: int = 4
    """Timed optimizer steps a turn."""
    warmup: int = 3
    """Untimed steps of each loop before the first turn."""
    threads: int | None = None
    """Threads of each loop on a CPU; PyTorch's choice where None."""


@dataclass(slots=True)
class Measured:
    """What one loop took."""

    loop: str
    step_seconds: list[float] = field(default_factory=list)
    """Mean of each turn."""
    step_cpu_seconds: list[float] = field(default_factory=list)
    """CPU time of the process, likewise: on a busy machine it says more."""
    peak_bytes: int = 0
    """Resident on a CPU, building included; allocated on a GPU."""
    loss: float = 0.0
    """Of the last step, nats a token."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All loops of one run."""

    request: BenchRequest
    device: str
    threads: int
    matmul_tflops: float
    """What a large product reaches on this device in the run's precision."""
    peak_tflops: float | None
    """Of the data sheet, or as told; None where it is not known."""
    measured: tuple[Measured, ...]
    """Ours first."""

    @property
    def tokens_per_step(self) -> int:
        """Target tokens an optimizer step."""
        return self.request.config.train.global_batch_size * self.request.config.model.max_seq_len

    def tokens_per_second(self, one: Measured) -> float:
        """By the median turn."""
        return self.tokens_per_step / median(one.step_seconds)

    def speed(self, one: Measured, *, cpu: bool = False) -> float:
        """Tokens a second over ours: the median of the rounds' ratios, so that what slows a round down slows both."""
        pairs = zip(
            self.measured[0].step_cpu_seconds if cpu else self.measured[0].step_seconds,
            one.step_cpu_seconds if cpu else one.step_seconds,
            strict=True,
        )
        return median(our_seconds / seconds for our_seconds, seconds in pairs)

    def utilization(self, one: Measured, attention: flops.AttentionCount, peak_tflops: float) -> float:
        """Model FLOPs a second over a peak: MFU, of the device's peak or of what a product reaches.

        Source: Chowdhery et al. 2022, appendix B; `megagpt.model.flops.flops_per_token` has both conventions.
        """
        config = self.request.config
        per_token = flops.flops_per_token(config.model, config.model.max_seq_len, attention)
        return self.tokens_per_second(one) * per_token / (peak_tflops * 1e12)

    def to_json(self) -> str:
        """Everything that was measured, and what the table shows."""
        config = self.request.config
        return json.dumps(
            {
                "config": config.model_dump(mode="json"),
                "device": self.device,
                "threads": self.threads,
                "tokens_per_step": self.tokens_per_step,
                "matmul_tflops": self.matmul_tflops,
                "peak_tflops": self.peak_tflops,
                "loops": {one.loop: self._figures(one) for one in self.measured},
            },
            indent=1,
        )

    def _figures(self, one: Measured) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "tokens_per_second": self.tokens_per_second(one),
            "step_seconds": one.step_seconds,
            "step_cpu_seconds": one.step_cpu_seconds,
            "speed_over_ours": self.speed(one),
            "cpu_speed_over_ours": self.speed(one, cpu=True),
            "peak_bytes": one.peak_bytes,
            "loss": one.loss,
        }
        attentions: tuple[flops.AttentionCount, ...] = ("full", "causal")
        for attention in attentions:
            figures[f"of_matmul_{attention}"] = self.utilization(one, attention, self.matmul_tflops)
            if self.peak_tflops is not None:
                figures[f"mfu_{attention}"] = self.utilization(one, attention, self.peak_tflops)
        return figures


def compare(request: BenchRequest, environment: Mapping[str, str], tell: Callable[[str], None]) -> Comparison:
    """Build every loop in a process of its own, and let them take turns.

    Args:
        request: what to measure.
        environment: of the processes, with what a launcher says to one alone.
        tell: is given what goes on.

    Raises:
        ConfigError: the loops could not be held against each other.
        MegaGPTError: one of them failed.
    """
    check_comparable(request)
    with ExitStack() as running:
        workers = [running.enter_context(Worker(loop, environment)) for loop in (OURS, *request.against)]
        built = [worker.build(request) for worker in workers]
        for worker in workers:
            tell(f"{worker.loop}: {request.warmup} steps of warm-up")
            if request.warmup:
                worker.ask({"steps": request.warmup})
        measured = [Measured(worker.loop) for worker in workers]
        for number in range(request.rounds):
            pairs = list(zip(workers, measured, strict=True))
            for worker, into in pairs if number % 2 == 0 else reversed(pairs):
                _take_turn(worker, into, request.steps)
                tell(f"round {number + 1} of {request.rounds}: {into.loop} {into.step_seconds[-1]:.4g} s a step")
        product = workers[0].ask({"products": _PRODUCTS})["tflops"]
    device = built[0]["device"]
    return Comparison(
        request=request,
        device=device,
        threads=built[0]["threads"],
        matmul_tflops=product,
        peak_tflops=request.config.log.peak_tflops or flops.peak_tflops(device),
        measured=tuple(measured),
    )


def check_comparable(request: BenchRequest) -> None:
    """Refuse what the loops would not do alike.

    Raises:
        ConfigError: naming the key and what to write instead.
    """
    config, against = request.config, request.against
    unknown = [name for name in against if name not in PEERS]
    if unknown:
        raise ConfigError(f"--against {unknown[0]}: not known; choose among {', '.join(PEERS)}")
    if config.parallel.tensor * config.parallel.pipeline * config.parallel.sequence > 1:
        raise ConfigError("bench train measures one process; set parallel.tensor, pipeline and sequence to 1")
    if config.train.dtype == "fp16":
        raise ConfigError("train.dtype is fp16, which needs a loss scale that the other loops lack; use bf16 or fp32")
    if isinstance(config.model, GPT2Model):
        if config.model.dropout > 0:
            raise ConfigError(f"model.dropout is {config.model.dropout}, which not all loops have; set it to 0")
    elif "nanogpt" in against:
        raise ConfigError("--against nanogpt: it has GPT-2's shape only; leave it out for model.family=llama")
    others = [name for name in against if name != "plain"]
    if config.train.recompute != "none" and others:
        raise ConfigError(
            f"train.recompute is {config.train.recompute}, which {others[0]} lacks; use --against plain, or none"
        )


def _take_turn(worker: Worker, into: Measured, steps: int) -> None:
    found = worker.ask({"steps": steps})
    into.step_seconds.append(found["step_seconds"])
    into.step_cpu_seconds.append(found["step_cpu_seconds"])
    into.peak_bytes = max(into.peak_bytes, found["peak_bytes"])
    into.loss = found["loss"]


class Worker:
    """A process with one loop, `megagpt.bench.worker`. It does nothing while another has its turn."""

    def __init__(self, loop: str, environment: Mapping[str, str]) -> None:
        self.loop = loop
        self._environment = environment

    def __enter__(self) -> Self:
        """Start the process."""
        self._log = tempfile.TemporaryFile("w+")
        # Answers have a pipe of their own: libraries print to standard output.
        answers, answered = os.pipe()
        self._answers = os.fdopen(answers)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megagpt.bench.worker", str(answered)],
            env=dict(self._environment),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[answered],
            text=True,
        )
        os.close(answered)
        return self

    def __exit__(self, *_: object) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._answers.close()
        self._log.close()

    def build(self, request: BenchRequest) -> dict[str, Any]:
        """Build the loop; what the process says of its device."""
        config = request.config.model_dump_json()
        return self.ask({"loop": self.loop, "config": config, "threads": request.threads})

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line, wait for one.

        Raises:
            MegaGPTError: what the loop said, or the end of the log of a process that has died.
        """
        assert self._process.stdin is not None  # noqa: S101 - PIPE
        with contextlib.suppress(BrokenPipeError):  # it has died: then no answer comes
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._answers.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            last = "".join(self._log.readlines()[-15:])
            raise MegaGPTError(f"{self.loop} ended with code {self._process.returncode} (-9: out of memory?):\n{last}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise MegaGPTError(f"{self.loop}: {found['error']}")
        return found


def parse_peers(text: str) -> tuple[str, ...]:
    """`plain,nanogpt` -> both, in this order, each once; the empty text -> none."""
    return tuple(dict.fromkeys(name for name in text.split(",") if name))


def write_json(comparison: Comparison, path: Path) -> None:
    """Write all figures."""
    path.write_text(comparison.to_json() + "\n", encoding="utf-8")


def summary(comparison: Comparison, bars: Sequence[tuple[str, float]] = (("plain", 1.05),)) -> list[str]:
    """One line for each peer: how ours stands, and for a bar whether it is kept.

    Args:
        comparison: what was measured.
        bars: peer -> the most by which it may be faster than ours.
    """
    lines = []
    limits = dict.fromkeys(PEERS, 1.0) | dict(bars)
    for one in comparison.measured[1:]:
        speed, limit = comparison.speed(one), limits[one.loop]
        kept = "kept" if speed <= limit else "NOT KEPT"
        lines.append(f"{one.loop} has {speed:.3f} x our speed; the bar is at most {limit:.2f}: {kept}")
    return lines
