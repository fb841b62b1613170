"""Groups of training processes from a fork server that has DeepSpeed imported: one starts in 0.1 s instead of 8.

The fork server only imports; it runs no tensor operation, so that nothing of torch's threads is forked.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
# DeepSpeed's first engine imports its Muon, whose decorator imports PyTorch's compiler: two seconds in each process.
_IMPORTED = ["megagpt.train.run", "deepspeed.runtime.zero.muon.muon_optimizer", "setuptools"]
_IMPORTED += ["evals.together", "evals.live"]  # lm-eval: five seconds


@dataclass
class Group:
    """Started processes; their output goes to one file."""

    processes: list[BaseProcess]
    log: Path

    def wait(self, seconds: float = 240.0) -> list[int | None]:
        """Exit codes. Kills what is still running then."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.signal(signal.SIGKILL)
        return codes

    def finish(self, seconds: float = 240.0) -> str:
        """Wait for all of them to succeed; what they printed."""
        codes = self.wait(seconds)
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.output()}"
        return self.output()

    def signal(self, number: int) -> None:
        """Send a signal to every process that still runs."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.join()

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def prepare_server() -> None:
    """Say what the server imports when it starts. `megagpt.bench.processes` asks the same one for less."""
    _SERVER.set_forkserver_preload(_IMPORTED)


def start(function: Callable[..., Any], world_size: int, *args: Any, log: Path) -> Group:
    """Call `function(*args)` in `world_size` processes, each with the launcher's environment variables.

    Its result, where it is an integer, is the exit code. Functions and arguments are pickled.
    """
    prepare_server()
    port = _free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    processes: list[BaseProcess] = [
        _SERVER.Process(target=_run, args=(function, args, rank, world_size, port, str(log)))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return Group(processes, log)


def train_command(words: list[str]) -> int:
    """What launch/pretrain.py does, for `start`."""
    from megagpt.train.run import main

    return main(words, os.environ)


def _run(function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, log: str) -> None:
    gc.freeze()  # what was imported, half a second's walk: DeepSpeed collects several times for each engine
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    result = function(*args)
    sys.stdout.flush()
    if isinstance(result, int):
        sys.exit(result)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
