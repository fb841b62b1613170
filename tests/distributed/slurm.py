"""A Slurm cluster of two nodes on this machine: a controller, two slurmd and munged of its own, for root."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

PATH = f"{os.defpath}:/usr/sbin:/usr/local/sbin"
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol")
NODES = ("n1", "n2")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=bf_interval=1
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def why_not() -> str | None:
    """Why a cluster cannot be made here; None where it can."""
    if os.geteuid() != 0:
        return "slurmd runs as root alone"
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


class Slurm:
    """The cluster; its state, sockets and logs lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{PATH}",
        }

    def __enter__(self) -> Slurm:
        reason = why_not()
        if reason:
            pytest.skip(reason)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError, subprocess.SubprocessError, AssertionError):
            self.say("scancel", "--user=root")
            self.say("scancel", "--user=root", "--full", "--signal=KILL")
            self._until(lambda: not self.say("squeue", "--noheader").strip(), "an empty queue")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def say(self, *command: str, check: bool = True, folder: Path | None = None, **more: str) -> str:
        """A Slurm command's output; `more` are variables of its environment."""
        environment = self._environment | more
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=folder, check=False, timeout=60
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, folder: Path, **environment: str) -> str:
        """`sbatch` in a folder; the job's number."""
        return self.say("sbatch", "--parsable", *words, folder=folder, **environment).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S+)", self.say("scontrol", "show", "job", job))
        assert found, name
        return found[1]

    def wait(self, job: str, value: str, field: str = "JobState", seconds: float = 150) -> None:
        """Until a field of the job has a value."""
        until = time.monotonic() + seconds
        while (now := self.field(job, field)) != value:
            assert time.monotonic() < until, f"{field} of job {job} is {now}, not {value}"
            time.sleep(0.3)

    def _start(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        config = CONFIG.format(folder=self.folder, host=socket.gethostname().split(".")[0], ports=free_ports(3))
        (self.folder / "slurm.conf").write_text(config)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        own = [
            f"--{name.replace('_', '-')}={self.folder}/munge.{name}"
            for name in ("socket", "pid_file", "log_file", "seed_file")
        ]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *own)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.say("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() == "2", "the nodes")

    def _daemon(self, name: str, *words: str) -> None:
        program = str(shutil.which(name, path=PATH))
        with (self.folder / f"{name}{len(self._daemons)}.out").open("wb") as log:
            daemon = subprocess.Popen([program, *words], env=self._environment, stdout=log, stderr=subprocess.STDOUT)
        self._daemons.append(daemon)

    def _until(self, there, what: str, seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not there():
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.out"))
            assert time.monotonic() < until, f"{what} did not come up\n{logs}"
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on."""
    listeners = [socket.socket() for _ in range(count)]
    for listener in listeners:
        listener.bind(("127.0.0.1", 0))
    ports = [int(listener.getsockname()[1]) for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports
