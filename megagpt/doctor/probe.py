"""What a host says about itself, as one line of JSON. Standard library only: `doctor` sends this file over ssh.

So it runs where nothing of megagpt is installed, and can say so. `python - '{"packages": [...], ...}' < probe.py`.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "MEGAGPT-DOCTOR "
"""Begins our line: login shells print of their own."""

SIOCGIFADDR = 0x8915
"""ioctl: IPv4 address of an interface. Source: linux/sockios.h."""

ADJTIMEX_BYTES, TIME_ERROR = 512, 5
"""Room for struct timex (208 bytes on 64-bit Linux); the clock's state when nothing sets it. Source: adjtimex(2)."""


def main(argument: str) -> None:
    """Do what the JSON argument asks, and print the answer."""
    clock_at_start = time.time()
    asked = json.loads(argument)
    answer = token_answer(asked) if "token" in asked else facts(asked)
    sys.stdout.write(MARK + json.dumps(answer | {"clock": [clock_at_start, time.time()]}) + "\n")
    sys.stdout.flush()
    os._exit(0)  # without torch's teardown, so that the far end hears the second time soon


def facts(asked: dict[str, Any]) -> dict[str, Any]:
    """Everything that `checks.py` judges."""
    put_python_first()
    return {
        "host": socket.gethostname(),
        "addresses": output("hostname", "-I").split(),
        "interfaces": interfaces(),
        "hostname_address": hostname_address(),
        "python": {"path": sys.executable, "version": platform.python_version()},
        "packages": {name: package_version(name) for name in asked["packages"]},
        "source": source_tree(),
        "compiler": compiler(),
        "ninja": shutil.which("ninja"),
        "locks": [lock for folder in extension_folders() for lock in locks_in(folder)],
        "disk": {folder: disk(folder) for folder in ["/dev/shm", *asked["folders"]]},
        "cores": len(os.sched_getaffinity(0)),
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "torch": torch_build(),
        "gpus": gpus(),
        "clock_is_set": clock_is_set(),
    }


def token_answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Write, read or remove a token file: whether a folder is really the same one on every host."""
    path = Path(asked["path"])
    try:
        if asked["token"] == "write":
            path.write_text(asked["text"])
            return {"text": asked["text"]}
        if asked["token"] == "remove":
            path.unlink(missing_ok=True)
            return {"text": None}
        return {"text": read_when_there(path, asked["seconds"])}
    except OSError as error:
        return {"error": str(error)}


def read_when_there(path: Path, seconds: float) -> str | None:
    """A network file system may show a new file late."""
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        os.listdir(path.parent)  # noqa: PTH208 - asks the server anew
        time.sleep(0.2)
    return path.read_text() if path.exists() else None


def put_python_first() -> None:
    """As launch/pretrain.py does, so that the environment's own ninja is found."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def output(*command: str) -> str:
    """What a program prints; nothing where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def interfaces() -> dict[str, str]:
    """Interface -> IPv4 address, of those that have one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def hostname_address() -> str | None:
    """Where the host's own name leads: gloo listens there when it is told no interface."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def package_version(name: str) -> str | None:
    """The installed version, None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_tree() -> dict[str, str] | None:
    """Where megagpt is imported from, and a hash over its Python files."""
    sys.path.insert(0, str(Path.cwd()))  # as under the deepspeed launcher
    found = importlib.util.find_spec("megagpt")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return {"path": str(folder), "hash": digest.hexdigest()[:12]}


def compiler() -> str | None:
    """The C++ compiler that torch builds DeepSpeed's op with, and its version."""
    path = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    return f"{path}: {output(path, '--version').partition(chr(10))[0]}" if path else None


def extension_folders() -> list[Path]:
    """Where ops are built: what the environment says, this Python's own folder, torch's default."""
    folders = [Path(sys.prefix) / "torch_extensions", Path.home() / ".cache" / "torch_extensions"]
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return [Path(named), *folders] if named else folders


def locks_in(folder: Path) -> list[dict[str, Any]]:
    """Lock files of builds, with the process of this host that holds each; none: its builder has died.

    torch waits for such a file without an end (torch.utils.file_baton).
    """
    paths = [path for pattern in ("*/lock", "*/*/lock") for path in sorted(folder.glob(pattern))]
    return [
        {"path": str(path), "age_seconds": time.time() - path.stat().st_mtime, "held_by": holder(path)}
        for path in paths
    ]


def holder(path: Path) -> int | None:
    """The process that has a file open, among those we may look at."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.readlink() == path.resolve():
                return int(descriptor.parts[2])
        except OSError:
            continue
    return None


def disk(folder: str) -> dict[str, Any] | None:
    """Total and free bytes, and whether we may write; None where there is no such folder."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return {"total_bytes": usage.total, "free_bytes": usage.free, "writable": os.access(folder, os.W_OK)}


def torch_build() -> dict[str, Any]:
    """What torch was built with, and whether it sees a GPU."""
    try:
        import torch

        version: Callable[[], tuple[int, ...]] = torch.cuda.nccl.version
        nccl = ".".join(map(str, version())) if torch.distributed.is_nccl_available() else None
        return {"cuda": torch.version.cuda, "nccl": nccl, "devices": torch.cuda.device_count()}
    except Exception as error:  # noqa: BLE001 - a broken installation fails in any way, and is what we look for
        return {"error": f"{type(error).__name__}: {error}"}


def gpus() -> dict[str, Any] | None:
    """Driver and GPUs as nvidia-smi tells; None where there is no NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    rows = csv_rows("--query-gpu=index,uuid,name,memory.total,memory.used,driver_version")
    processes = csv_rows("--query-compute-apps=gpu_uuid,pid,used_memory")
    return {
        "driver": rows[0][5] if rows else None,
        "driver_cuda": driver_cuda(output("nvidia-smi")),
        "devices": [
            {
                "index": int(index),
                "name": name,
                "total_mib": number(total),
                "used_mib": number(used),
                "pids": [int(pid) for owner, pid, _ in processes if owner == uuid],
            }
            for index, uuid, name, total, used, _ in rows
        ],
    }


def number(text: str) -> float | None:
    """A cell of nvidia-smi; None for its `[N/A]` and the like."""
    return None if text.startswith("[") else float(text)


def csv_rows(query: str) -> list[list[str]]:
    """Rows of an nvidia-smi query."""
    text = output("nvidia-smi", query, "--format=csv,noheader,nounits")
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]


def driver_cuda(text: str) -> str | None:
    """The newest CUDA that the driver can run, from nvidia-smi's banner."""
    _, found, rest = text.partition("CUDA Version:")
    return rest.split()[0] if found else None


def clock_is_set() -> bool | None:
    """Whether the kernel knows of something (NTP, PTP) that keeps its clock right; None where it does not tell."""
    try:
        adjtimex: Callable[[Any], int] = ctypes.CDLL(None, use_errno=True).adjtimex
        state = adjtimex(ctypes.create_string_buffer(ADJTIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return state != TIME_ERROR if state >= 0 else None


if __name__ == "__main__":
    main(sys.argv[1])
