"""The hosts of a run and a Python on each of them: the hostfile, and programs that are sent over ssh."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Any, TypeVar

from megagpt.doctor import probe
from megagpt.errors import ConfigError, unread

T = TypeVar("T")

LOCALHOST = "localhost"
NO_FOLDER, NO_PYTHON = 91, 92
"""Exit codes of our own line of shell, where there is nothing to start."""

SSH_CONNECT_SECONDS = 10
EXPORTED = ("PYTHON", "NCCL", "UCX", "MV2", "MLFLOW")
"""Beginnings of variables that the deepspeed launcher hands on. Source: deepspeed/launcher/runner.py, EXPORT_ENVS."""

_SSH_TROUBLE = (
    ("Host key verification failed", "its key is unknown here; run `ssh-keyscan {host} >> ~/.ssh/known_hosts`"),
    ("Permission denied", "let your key in without a password: `ssh-copy-id {host}`"),
    ("Connection refused", "start sshd there, or give its port with --ssh-port"),
    ("Could not resolve", "the name is unknown here; mend the hostfile, or add it to DNS or /etc/hosts"),
    ("timed out", "the host is down, or a firewall drops the connection"),
    ("No route to host", "the host is down, or not in this network"),
)


@dataclass(frozen=True, slots=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int


@dataclass(frozen=True, slots=True)
class Access:
    """How programs are started on the hosts: as the deepspeed launcher does it."""

    hosts: tuple[Host, ...]
    remote: bool
    """Over ssh; otherwise on this host, without."""
    folder: Path
    """Working directory on every host."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What the launcher hands on."""
    ssh_port: int | None = None

    def command(self, host: Host, arguments: Sequence[str]) -> list[str]:
        """The words that start this Python on a host; it reads its program from standard input."""
        exports = [f"{name}={value}" for name, value in self.environment.items()]
        python = [sys.executable, "-u", "-", *arguments]
        if not self.remote:
            return ["env", *exports, *python]
        port = ["-p", str(self.ssh_port)] if self.ssh_port is not None else []
        ssh = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_CONNECT_SECONDS}", *port, host.name]
        line = (
            f"cd {shlex.quote(str(self.folder))} || exit {NO_FOLDER}; "
            f"test -x {shlex.quote(sys.executable)} || exit {NO_PYTHON}; exec {shlex.join(['env', *exports, *python])}"
        )
        return [*ssh, line]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program on a host said: lines of JSON, or why there are none."""

    rows: tuple[dict[str, Any], ...]
    trouble: str | None = None
    fix: str = ""
    clock: tuple[float, float] = (0.0, 0.0)
    """This host's clock before and after, seconds since 1970."""


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a file of lines `NAME slots=N`, as the deepspeed launcher reads it.

    Raises:
        ConfigError: no such file, a line of another form, a host twice, or no host at all.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise unread(error, ConfigError, f"{path}: cannot read the hostfile: {error.strerror}") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        found = re.match(r"(\S+)\s+slots=(\d+)", line)
        if found is None:
            raise ConfigError(f"{path}:{number}: {line!r} is not of the form `NAME slots=N`")
        name, slots = found[1], int(found[2])
        if name in hosts:
            raise ConfigError(f"{path}:{number}: {name} is listed twice; give it one line with all of its slots")
        hosts[name] = Host(name, slots)
    if not hosts:
        raise ConfigError(f"{path}: no host; write lines of the form `NAME slots=N`")
    return tuple(hosts.values())


def launcher_environment(environment: Mapping[str, str], files: Iterable[Path]) -> dict[str, str]:
    """The variables that the deepspeed launcher sets on every host.

    Args:
        environment: of this process.
        files: `.deepspeed_env` files, the later ones winning; those that do not exist count for nothing.

    Raises:
        ConfigError: a line without `=`, on which the launcher itself ends with a traceback.
    """
    found = {name: value for name, value in environment.items() if name.startswith(EXPORTED)}
    for path in files:
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            name, equals, value = line.partition("=")
            if not equals:
                raise ConfigError(
                    f"{path}:{number}: not of the form NAME=VALUE; "  # the line itself may be a secret
                    "the deepspeed launcher reads no blank lines and no comments"
                )
            found[name.strip()] = value.strip()
    return found


def on_all(hosts: Sequence[Host], work: Callable[[Host], T]) -> dict[str, T]:
    """Do something for each host at the same time; results by name, in the hosts' order."""
    with ThreadPoolExecutor(max_workers=max(1, min(64, len(hosts)))) as pool:
        return dict(zip([host.name for host in hosts], pool.map(work, hosts), strict=True))


def ask(access: Access, host: Host, program: str, arguments: Sequence[str], seconds: float) -> Answer:
    """Run a program of ours on a host and read its lines."""
    command = access.command(host, arguments)
    started_at = time()
    try:
        done = subprocess.run(
            command, input=program, capture_output=True, text=True, timeout=seconds, cwd=access.folder, check=False
        )
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else ""
        return Answer(_rows(said), f"no answer within {seconds:.0f} s", "look at the host: load, disks, network")
    except FileNotFoundError:
        return Answer((), f"{command[0]} is not installed here", "install openssh-client")
    clock = (started_at, time())
    rows = _rows(done.stdout)
    if done.returncode == 0:
        return Answer(rows, clock=clock)
    return Answer(rows, *_explain(access, host, done.returncode, done.stderr), clock)


def _rows(text: str) -> tuple[dict[str, Any], ...]:
    lines = [line.removeprefix(probe.MARK) for line in text.splitlines() if line.startswith(probe.MARK)]
    return tuple(json.loads(line) for line in lines)


def _explain(access: Access, host: Host, code: int, stderr: str) -> tuple[str, str]:
    last = stderr.strip().splitlines()[-1] if stderr.strip() else f"exit code {code}"
    if access.remote and code == NO_FOLDER:
        return f"no folder {access.folder}", "mount the checkout's file system there, at the same path"
    if access.remote and code == NO_PYTHON:
        return f"no {sys.executable}", "put the Python environment on storage that all hosts share, at the same path"
    if access.remote and code == 255:
        for words, fix in _SSH_TROUBLE:
            if words in stderr:
                return last, fix.format(host=host.name)
        return last, f"try `ssh {host.name} hostname`; it must work without a password"
    return last, "run the same Python there by hand and mend what it says"
