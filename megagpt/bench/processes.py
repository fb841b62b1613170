"""Groups of local processes on the CPU, as a launcher starts them, from a server that has DeepSpeed imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megagpt.errors import MegaGPTError

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["megagpt.train.build"])
_SHOWN_ON_FAILURE = 30
"""Last lines of the processes' output."""


def run_group(function: Callable[..., None], world_size: int, *args: Any, log: Path, seconds: float = 600.0) -> None:
    """Call `function(rank, world_size, *args)` in processes that find each other as under a launcher, and wait.

    Args:
        function: what each of them does; it and `args` are pickled.
        world_size: processes.
        args: for the function.
        log: what the processes print goes there.
        seconds: to wait at most.

    Raises:
        MegaGPTError: one of them failed or took too long; with the end of what they printed.
    """
    log.touch()
    port = _free_port()
    targets = ((function, args, rank, world_size, port, str(log)) for rank in range(world_size))
    processes: list[BaseProcess] = [_SERVER.Process(target=_run, args=target) for target in targets]
    with _server_environment():
        for process in processes:
            process.start()
    try:
        _wait(processes, time.monotonic() + seconds)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        printed = "\n".join(log.read_text(errors="replace").splitlines()[-_SHOWN_ON_FAILURE:])
        raise MegaGPTError(f"exit codes {codes} of {world_size} processes, or over {seconds:g} seconds:\n{printed}")


def _wait(processes: list[BaseProcess], until: float) -> None:
    """Until all have ended, one has failed, or the time is over: the others would wait for one that failed."""
    while time.monotonic() < until:
        if all(process.exitcode is not None for process in processes) or any(p.exitcode for p in processes):
            return
        time.sleep(0.05)


@contextmanager
def _server_environment() -> Iterator[None]:
    """The server starts with the first process, and imports DeepSpeed: it must not take a GPU for its device."""
    name = "DS_ACCELERATOR"
    before = os.environ.get(name)
    os.environ[name] = "cpu"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _run(function: Callable[..., None], args: tuple[Any, ...], rank: int, world_size: int, port: int, log: str) -> None:
    from megagpt.train.environment import put_environment_first

    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    put_environment_first(os.environ)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(rank, world_size, *args)
    sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
