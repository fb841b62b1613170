"""A host that is well, as the probe tells it."""

from __future__ import annotations

from typing import Any

from megagpt.doctor.checks import Seen, judge
from megagpt.doctor.hosts import Host

REQUIREMENTS = ("torch==2.13.0", "deepspeed==0.19.8", "numpy>=2.0")
GIB = 2**30


def gpu(index: int, **other: Any) -> dict[str, Any]:
    usual = {"index": index, "name": "NVIDIA A100-SXM4-80GB", "total_mib": 81920.0, "used_mib": 4.0, "pids": []}
    return usual | other


def well(**other: Any) -> dict[str, Any]:
    """Facts of a GPU host, with some of them replaced."""
    return {
        "host": "node",
        "addresses": ["10.0.0.1"],
        "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"},
        "hostname_address": "10.0.0.1",
        "python": {"path": "/env/bin/python", "version": "3.11.7"},
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "2.3.1"},
        "source": {"path": "/opt/megagpt", "hash": "abc"},
        "compiler": "/usr/bin/c++: c++ 12.2.0",
        "ninja": "/env/bin/ninja",
        "locks": [],
        "disk": {"/dev/shm": {"total_bytes": 500 * GIB, "free_bytes": 499 * GIB, "writable": True}},
        "cores": 96,
        "memlock_bytes": -1,
        "torch": {"cuda": "12.8", "nccl": "2.27.5", "devices": 8},
        "gpus": {"driver": "570.86", "driver_cuda": "12.8", "devices": [gpu(index) for index in range(8)]},
        "clock_is_set": True,
        "clock": [100.0, 101.0],
        "our_clock": (99.9, 101.1),
    } | other


def ill(variables: dict[str, str] | None = None, *, several: bool = True, slots: int = 8, **other: Any):
    """Check -> (status, value, fix), of what is not well on a host that differs from its neighbour in `other`."""
    seen = Seen(Host("n2", slots), well(**other), "n1", well(), REQUIREMENTS, variables or {}, several)
    return {row.check: (row.status, row.value, row.fix) for row in judge(seen) if row.status != "ok"}
