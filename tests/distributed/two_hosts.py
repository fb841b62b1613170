"""Two hosts out of one: network namespaces joined by a cable, an sshd in each. For root on Linux."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SSHD = shutil.which("sshd", path=f"{os.defpath}:/usr/sbin:/usr/local/sbin")
PRIVILEGE_SEPARATION = Path("/run/sshd")
"""Debian's sshd does not start without this folder, which its service makes."""

SSHD_CONFIG = """\
Port 22
HostKey {host_key}
AuthorizedKeysFile {public_key}
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
LogLevel VERBOSE
"""
SSH_CONFIG = """\
Host {name}
  HostName {address}
  User root
  IdentityFile {key}
  IdentitiesOnly yes
  UserKnownHostsFile {known_hosts}
  GlobalKnownHostsFile /dev/null
  HostKeyAlias {name}
"""


def why_not() -> str | None:
    """Why two hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "network namespaces are made by root alone"
    missing = [name for name in ("ip", "ssh", "ssh-keygen", "pdsh") if shutil.which(name) is None]
    missing += [] if SSHD else ["sshd"]
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["ip", "netns", "add", f"try{os.getpid()}"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"may not make network namespaces: {tried.stderr.strip()}"
    run("ip", "netns", "del", f"try{os.getpid()}")
    return None


class TwoHosts:
    """`alpha` and `beta`, each with an interface eth0, its own address and its own sshd on port 22.

    Args:
        folder: for keys, logs, the hostfile and .deepspeed_env; commands run in it.
        private: a folder that is another one on `beta`, though it has the same name.
    """

    def __init__(self, folder: Path, private: Path) -> None:
        self.folder = folder
        self.addresses = {"alpha": "10.231.7.1", "beta": "10.231.7.2"}
        self._namespaces = {name: f"{name}{os.getpid()}" for name in self.addresses}
        self.private = private
        self._sshd: dict[str, subprocess.Popen[bytes]] = {}
        self._made_folder = False

    def __enter__(self) -> TwoHosts:
        reason = why_not()
        if reason:
            pytest.skip(reason)
        try:
            self._join()
            self._write_keys()
            for name in self.addresses:
                self.start_sshd(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._sshd):
            self.stop_sshd(name)
        for namespace in self._namespaces.values():
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)
        if self._made_folder:
            with suppress(OSError):
                PRIVILEGE_SEPARATION.rmdir()

    def write_hostfile(self, slots: int) -> Path:
        path = self.folder / "hosts"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.addresses))
        return path

    def start(self, *command: str, on: str = "alpha", named: bool = False) -> subprocess.Popen[str]:
        """A command on a host, in the folder, as a person who is logged in there starts it.

        Args:
            command: its words.
            on: the host.
            named: the host has its name also for those that ask the system; else both have the machine's, and their
                processes take each other for neighbours.
        """
        if named:
            command = ("unshare", "--uts", "sh", "-c", f'hostname {on} && exec "$@"', "sh", *command)
        environment = os.environ | {
            "PATH": os.pathsep.join([str(self.folder / "bin"), str(BIN), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self._namespaces[on], *command],
            cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *command: str, on: str = "alpha", seconds: float = 120) -> tuple[int, str]:
        """Exit code and output of a command."""
        process = self.start(*command, on=on)
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            pytest.fail(f"{command} ran for more than {seconds} s\n{out}")
        return process.returncode, out

    def processes(self, name: str) -> list[psutil.Process]:
        """Everything that runs on a host."""
        done = subprocess.run(
            ["ip", "netns", "pids", self._namespaces[name]], capture_output=True, text=True, check=True
        )
        return [psutil.Process(int(pid)) for pid in done.stdout.split()]

    def start_sshd(self, name: str) -> None:
        """`ip netns exec` gives a namespace of mounts as well: one folder of beta's is its own."""
        config = self.folder / f"sshd_{name}"
        config.write_text(SSHD_CONFIG.format(host_key=self.folder / f"host_{name}", public_key=self.folder / "key.pub"))
        hidden = f"mount -t tmpfs none {self.private} && " if name == "beta" else ""
        command = f"{hidden}exec {SSHD} -D -f {config} -E {self.folder}/sshd_{name}.log"
        namespace = self._namespaces[name]
        self._sshd[name] = subprocess.Popen(["ip", "netns", "exec", namespace, "sh", "-c", command])
        until = time.monotonic() + 10
        while "Server listening" not in self._log(name):
            assert self._sshd[name].poll() is None, self._log(name)
            assert time.monotonic() < until, "sshd does not listen"
            time.sleep(0.02)

    def stop_sshd(self, name: str) -> None:
        self._sshd[name].terminate()
        self._sshd.pop(name).wait()
        (self.folder / f"sshd_{name}.log").unlink(missing_ok=True)

    def cut(self, name: str) -> None:
        """Its cable is pulled: nothing says so to whoever is connected, on either side."""
        run("ip", "-n", self._namespaces[name], "link", "set", "eth0", "down")

    def mend(self, name: str) -> None:
        """The cable is back."""
        run("ip", "-n", self._namespaces[name], "link", "set", "eth0", "up")

    def _log(self, name: str) -> str:
        path = self.folder / f"sshd_{name}.log"
        return path.read_text() if path.exists() else ""

    def _join(self) -> None:
        """A cable between them; both ends are called eth0, as on hosts of one make."""
        for namespace in self._namespaces.values():
            run("ip", "netns", "add", namespace)
        alpha, beta = self._namespaces.values()
        run(*f"ip link add eth0 netns {alpha} type veth peer name eth0 netns {beta}".split())
        for name, address in self.addresses.items():
            inside = ("ip", "-n", self._namespaces[name])
            run(*inside, "address", "add", f"{address}/24", "dev", "eth0")
            run(*inside, "link", "set", "eth0", "up")
            run(*inside, "link", "set", "lo", "up")

    def _write_keys(self) -> None:
        if not PRIVILEGE_SEPARATION.exists():
            PRIVILEGE_SEPARATION.mkdir()
            self._made_folder = True
        known_hosts, config = self.folder / "known_hosts", ""
        make_key(self.folder / "key")
        for name, address in self.addresses.items():
            key = make_key(self.folder / f"host_{name}")
            with known_hosts.open("a") as file:
                file.write(f"{name} {key}\n")
            config += SSH_CONFIG.format(name=name, address=address, key=self.folder / "key", known_hosts=known_hosts)
        (self.folder / "ssh_config").write_text(config)
        program = self.folder / "bin" / "ssh"  # ssh finds its configuration by the user, not by $HOME
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        program.chmod(0o755)
        (self.folder / ".deepspeed_env").write_text(
            "GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\n"
            + "".join(f"{name}={os.environ[name]}\n" for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ)
        )


def make_key(path: Path) -> str:
    """An ssh key pair; the public half, without its comment."""
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def run(*command: str) -> None:
    """A command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
