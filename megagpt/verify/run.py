"""A verification from the user's configuration to its verdict. Read it from `verify` downwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from megagpt.config.schema import TrainingRun
from megagpt.verify.compare import Finding, compare
from megagpt.verify.files import Files
from megagpt.verify.reference import Course, reference_course
from megagpt.verify.shrink import Small, shrink
from megagpt.verify.tokens import write_tokens

POLL_SECONDS = 0.1
LOG_LINES = 15
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

Say = Callable[[str], None]
"""Shows how far it is."""


class Running(Protocol):
    """Processes that were started."""

    def poll(self) -> int | None:
        """None while any of them runs; 0 where all ended well."""


Start = Callable[[Files, int], AbstractContextManager[Running]]
"""Starts so many processes of `megagpt.verify.worker`; none of them is left when its block ends."""


@dataclass(frozen=True, slots=True)
class Request:
    """What `megagpt verify` was asked."""

    steps: int
    processes: int | None
    """To start here; None: as few as hold the layout."""
    world_size: int | None
    """Of the real run, where it is known."""
    seconds: float
    """After which processes that still run are taken for stuck."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything that was found."""

    small: Small
    findings: tuple[Finding, ...]
    log: tuple[str, ...]
    """The last lines that the processes printed, where they did not end well."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return all(finding.ok for finding in self.findings)

    def to_json(self) -> str:
        """For programs."""
        plain = {
            "ok": self.ok,
            "processes": self.small.world_size,
            "parallel": json.loads(self.small.config.parallel.model_dump_json()),
            "changes": self.small.changes,
            "not_run": self.small.not_run,
            "findings": [asdict(finding) for finding in self.findings],
            "log": self.log,
            "seconds": round(self.seconds, 1),
        }
        return json.dumps(plain, indent=1)


def verify(config: TrainingRun, request: Request, start: Start, say: Say) -> Verdict:
    """Run a configuration, shrunk, in its layout on local processes and in plain PyTorch, and compare.

    Args:
        config: the user's; its data is not read and its folder not touched.
        request: how much.
        start: `started_processes`, with the variables of this process.
        say: is told how far it is.

    Raises:
        ConfigError: the layout is refused, or does not fit into so many processes.
    """
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megagpt-verify-") as name:
        files = Files(Path(name))
        small = shrink(
            config, files.folder, steps=request.steps, processes=request.processes, world_size=request.world_size
        )
        configs: dict[str, TrainingRun] = {
            one.train.dtype: one for one in (small.config, small.in_own_dtype) if one is not None
        }
        write_tokens(small.config)
        files.write_configs(configs)
        say(f"starting {small.world_size} processes")
        with start(files, small.world_size) as processes:
            courses = {run: _course(one, run, say) for run, one in configs.items()}
            failure = _wait(processes, files, request.seconds, say)
        if failure is not None:
            log = files.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            findings = [Finding("fp32", f"{small.world_size} processes train", ok=False, first=failure)]
            return Verdict(small, tuple(findings), tuple(log), time.monotonic() - started_at)
        say("comparing")
        findings = [
            finding for run, one in configs.items() for finding in compare(one, courses[run], files, small.world_size)
        ]
    return Verdict(small, tuple(findings), (), time.monotonic() - started_at)


def _course(config: TrainingRun, run: str, say: Say) -> Course:
    last = config.train.max_steps
    return reference_course(config, lambda step: say(f"plain PyTorch, {run}: step {step + 1} of {last}"))


@contextmanager
def started_processes(environment: Mapping[str, str], files: Files, world_size: int) -> Iterator[Running]:
    """A `Start`, given this process's variables."""
    command = [sys.executable, "-m", "megagpt.verify", str(files.folder), str(world_size), str(_free_port())]
    with files.log.open("wb") as log:
        started = subprocess.Popen(
            command,
            env={**environment, **ON_CPU},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that all of them can be ended together
        )
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def _wait(processes: Running, files: Files, seconds: float, say: Say) -> str | None:
    """Until they end; why they failed, where they did."""
    until, n_said = time.monotonic() + seconds, 0
    while (code := processes.poll()) is None:
        said = files.said()
        for line in said[n_said:]:
            say(line)
        n_said = len(said)
        if time.monotonic() > until:
            return f"they did not end within {seconds:g} s; the last that was heard: {said[-1] if said else 'nothing'}"
        time.sleep(POLL_SECONDS)
    if code == 0:
        return None
    return "; ".join(files.failures()) or f"the processes ended with exit code {code}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
