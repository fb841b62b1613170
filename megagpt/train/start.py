"""A process takes its device and its place among the others."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Literal

import torch
from torch._C._distributed_c10d import Store
from torch.distributed.distributed_c10d import _get_default_store

from megagpt.config.schema import ParallelSection
from megagpt.engine.engine import init_distributed
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.train.command import Launch

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A collective that waits longer than this ends the run; saves and evaluations of large models fit into it."""


def start_mesh(launch: Launch, parallel: ParallelSection, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Mesh:
    """Choose the device, join the process group, make the groups.

    Args:
        launch: what the launcher says.
        parallel: the layout.
        timeout: a collective that waits longer than this raises.
    """
    device_type: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cuda":
        torch.cuda.set_device(launch.local_rank)
    else:
        cores = os.cpu_count() or 1
        torch.set_num_threads(launch.threads or max(1, cores // launch.local_world_size))
    init_distributed(timeout, device_type=device_type)
    device = f"cuda:{launch.local_rank}" if device_type == "cuda" else "cpu"
    return make_mesh(launch.rank, launch.world_size, launch.local_rank, torch.device(device), parallel)


def process_store() -> Store:
    """The key-value store of the process group, which every process of every host reaches."""
    return _get_default_store()
