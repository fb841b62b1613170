"""Which process this is, under a launcher that says it in other words than deepspeed's; and its build tools."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from megagpt.errors import ConfigError

_DEFAULT_PORT = "29500"
"""The deepspeed launcher's."""


def put_environment_first(environment: MutableMapping[str, str]) -> None:
    """Let DeepSpeed build its C++ op with the tools of this Python environment and keep it there, activated or not.

    It takes the first `ninja` on PATH: a machine need not have one of its own. And it keeps the op in the user's cache:
    environments that share it, or another ninja, build it anew at every change, and wait for each other's lock.
    """
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        environment.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))


NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(7 * 24 * 3600),
}
"""Of torch 2.13's process groups of NCCL; what the user has set stays as it is.

Their own watchdog ends the process when a collective lasts longer than the group's time-out, which lies behind every
deadline of `watch.*` (`train.watch.collective_timeout`); 3, torch's default, means that it does so without taking NCCL
down in order before, which can hang. A monitor of that watchdog ends the process where it has stood still for 8 minutes
(torch's default), in a call of CUDA for instance: long before the deadlines of a start, save or evaluation, without
stacks and without a name. The watch ends such a process itself, with a timer that needs no lock where all else fails.
"""


def let_the_watch_speak(environment: MutableMapping[str, str]) -> None:
    """Set what keeps torch from ending a process that hangs before the watch has said for whom it waits."""
    for name, value in NCCL_SETTINGS.items():
        environment.setdefault(name, value)


def name_process(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, as deepspeed and torch read them.

    From srun's SLURM_* or mpirun's OMPI_COMM_WORLD_*; under no launcher, for one process alone. What is set already is
    left as it is; under the deepspeed launcher and torchrun that is all of it.
    """
    if "RANK" in environment:
        return
    # SLURM_PROCID is in a batch script's environment too; a step's number of tasks only where srun has started us.
    if "SLURM_STEP_NUM_TASKS" in environment:
        found = _from_srun(environment)
    elif "OMPI_COMM_WORLD_RANK" in environment:
        found = _from_mpirun(environment)
    else:
        found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    if found["LOCAL_SIZE"] == found["WORLD_SIZE"]:
        found |= {"MASTER_ADDR": "127.0.0.1"}
    if found["WORLD_SIZE"] == "1":
        found |= {"MASTER_PORT": "0"}  # whichever is free
    for name, value in ({"MASTER_PORT": _DEFAULT_PORT} | found).items():
        environment.setdefault(name, value)


def check_rendezvous(environment: Mapping[str, str]) -> None:
    """Refuse to start where the ranks could not find each other.

    Raises:
        ConfigError: several processes, and no MASTER_ADDR.
    """
    if int(environment.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" not in environment:
        raise ConfigError(
            "MASTER_ADDR is not set: the launcher does not say on which host rank 0 runs; "
            "give it to all ranks, as in `mpirun -x MASTER_ADDR=node01 -x MASTER_PORT=29500 ...`"
        )


def _from_srun(environment: Mapping[str, str]) -> dict[str, str]:
    per_node = _expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_SIZE": str(per_node[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": _first_host(environment["SLURM_STEP_NODELIST"]),
    }


def _from_mpirun(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": environment["OMPI_COMM_WORLD_SIZE"],
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "LOCAL_SIZE": environment["OMPI_COMM_WORLD_LOCAL_SIZE"],
    }


def _expand_counts(text: str) -> list[int]:
    """Slurm's `8(x2),4` -> 8, 8, 4."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def _first_host(nodelist: str) -> str:
    """Slurm's `gpu[03-07,12]-ib,login` -> gpu03-ib."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else nodelist)
