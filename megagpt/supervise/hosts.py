"""Which hosts of a hostfile a run can be started on just now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megagpt.atomic import write_file
from megagpt.config.schema import TrainingRun
from megagpt.doctor.hosts import Access, Host, ask, on_all, read_hostfile
from megagpt.errors import ConfigError, MegaGPTError, SystemFailed
from megagpt.parallel.plan import plan_batches

HOSTFILE = "hostfile"
"""In the run's folder: the hosts of the newest start."""
_PROGRAM = "pass"
_ANSWER_SECONDS = 30.0


class Hosts:
    """The hosts of a hostfile, asked before each start; the file may be changed between two.

    Args:
        hostfile: lines `NAME slots=N`.
        config: of the run: not every number of processes can hold its layout and batch.
        most: hosts to use at most, so that the others are spare ones; all where None.
        ssh_port: as for deepspeed.
        say: shows a line to the user.
    """

    def __init__(
        self,
        hostfile: Path,
        config: TrainingRun,
        most: int | None,
        ssh_port: int | None,
        say: Callable[[str], object],
    ) -> None:
        self._hostfile = hostfile
        self._config = config
        self._most = most
        self._ssh_port = ssh_port
        self._say = say

    def launcher_arguments(self) -> list[str]:
        """Ask all hosts, write those to use into the run's folder, and name that file to the launcher.

        Raises:
            ConfigError: the hostfile cannot be read.
            MegaGPTError: all hosts that it lists would be too few for any layout of this run.
            SystemFailed: too few of them answer; others may, in a while.
        """
        listed = read_hostfile(self._hostfile)
        legal_hosts(self._config, listed, self._most, "in the hostfile")
        answering = self._answering(listed)
        try:
            chosen = legal_hosts(self._config, answering, self._most)
        except MegaGPTError as error:
            raise SystemFailed(f"too few hosts answer: {error}") from None
        left_over = [host.name for host in answering if host not in chosen]
        if left_over:
            self._say(f"not used: {', '.join(left_over)} (spare, or the batch does not divide among them)")
        path = self._config.run.dir / HOSTFILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, "".join(f"{host.name} slots={host.slots}\n" for host in chosen).encode())
        # One host of several is still to be reached over ssh: it need not be this one.
        return ["--hostfile", str(path), "--force_multi"]

    def _answering(self, listed: Sequence[Host]) -> list[Host]:
        access = Access(tuple(listed), remote=True, folder=Path.cwd(), ssh_port=self._ssh_port)
        answers = on_all(listed, lambda host: ask(access, host, _PROGRAM, (), _ANSWER_SECONDS))
        for name, answer in answers.items():
            if answer.trouble is not None:
                self._say(f"left out: {name}: {answer.trouble}; {answer.fix}")
        return [host for host in listed if answers[host.name].trouble is None]


def legal_hosts(
    config: TrainingRun, hosts: Sequence[Host], most: int | None = None, which: str = "that answer"
) -> tuple[Host, ...]:
    """As many of the first hosts as the run's layout and batch can use.

    Raises:
        MegaGPTError: no number of these hosts will do, and why the largest does not.
    """
    why = "no host answers"
    for count in range(min(len(hosts), most or len(hosts)), 0, -1):
        chosen = tuple(hosts[:count])
        try:
            plan_batches(config, sum(host.slots for host in chosen))
        except ConfigError as error:
            if count == min(len(hosts), most or len(hosts)):
                why = str(error)
            continue
        return chosen
    names = ", ".join(host.name for host in hosts) or "none"
    raise MegaGPTError(f"{config.run.dir}: cannot be started on the hosts {which} ({names}): {why}")
