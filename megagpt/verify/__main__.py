"""`python -m megagpt.verify FOLDER PROCESSES PORT`: the processes of a verification, with a launcher's environment.

All of them are forked from one that has imported DeepSpeed, which takes longer than the rest.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from megagpt.train.environment import put_environment_first
from megagpt.train.run import exit_process
from megagpt.verify.files import Files
from megagpt.verify.worker import exit_code_of


def main(folder: str, processes: str, port: str) -> int:
    """Start them and wait; 0 where all of them succeed. Where one fails, the others are killed."""
    put_environment_first(os.environ)
    files = Files(Path(folder))
    running = {_fork(files, rank, int(processes), port) for rank in range(int(processes))}
    code = 0
    while running:
        ended, status = os.wait()
        running.discard(ended)
        if status and not code:
            code = 1
            for child in running:
                os.kill(child, signal.SIGKILL)
    return code


def _fork(files: Files, rank: int, world_size: int, port: str) -> int:
    child = os.fork()  # nothing but imports has happened: no thread of torch is lost
    if child == 0:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        exit_process(exit_code_of(files, rank, world_size))
    return child


if __name__ == "__main__":
    exit_process(main(*sys.argv[1:]))
