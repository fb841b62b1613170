"""All checks of `megagpt doctor`, in the order in which one depends on another."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from megagpt.doctor import all_reduce, probe
from megagpt.doctor.checks import Finding, Seen, judge
from megagpt.doctor.hosts import LOCALHOST, Access, Answer, Host, ask, launcher_environment, on_all, read_hostfile

PROBE_SECONDS = 120.0
"""For importing torch from a shared file system that is cold."""
TOKEN_SECONDS = 60.0
"""For a network file system to show another host's file. NFS keeps what it knows of a folder for up to 60 s."""
DEFAULT_PORT = 29500
"""The deepspeed launcher's --master_port."""


@dataclass(frozen=True, slots=True)
class Request:
    """What `megagpt doctor` was asked."""

    hostfile: Path | None
    folders: tuple[Path, ...]
    """That must be the same ones on every host."""
    seconds: float
    """For the all-reduce."""
    master_addr: str | None = None
    master_port: int = DEFAULT_PORT
    ssh_port: int | None = None


@dataclass(frozen=True, slots=True)
class Examination:
    """Everything that was found."""

    hosts: tuple[Host, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; warnings count as nothing."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What would stop or spoil a run."""
        return tuple(finding for finding in self.findings if finding.status == "error")

    def to_json(self) -> str:
        """For programs."""
        plain = {
            "ok": self.ok,
            "hosts": [asdict(host) for host in self.hosts],
            "findings": [asdict(finding) for finding in self.findings],
        }
        return json.dumps(plain, indent=1)


def examine(request: Request, environment: Mapping[str, str]) -> Examination:
    """Look at this host, or at every host of a hostfile.

    Args:
        request: what to look at.
        environment: variables of this process.

    Raises:
        ConfigError: a hostfile or a .deepspeed_env that the launcher cannot read.
    """
    access = _access(request, environment)
    answers = on_all(access.hosts, lambda host: _probe(access, host, request.folders))
    findings = _launcher(access) + _reached(access, answers)
    facts = {name: answer.rows[0] | {"our_clock": answer.clock} for name, answer in answers.items() if answer.rows}
    reached = tuple(host for host in access.hosts if host.name in facts)
    findings += [finding for host in reached for finding in judge(_seen(access, host, reached[0], facts))]
    if len(reached) > 1:
        findings += _shared(access, reached, request.folders)
    missing = [host.name for host in access.hosts if host.name not in facts or "error" in facts[host.name]["torch"]]
    if not missing:
        findings += _all_reduce(access, request, facts)
    elif len(access.hosts) > 1:
        findings.append(Finding("all", "all-reduce", "warning", "not tried", f"mend first: {', '.join(missing)}"))
    return Examination(access.hosts, tuple(findings))


def _access(request: Request, environment: Mapping[str, str]) -> Access:
    folder = Path.cwd()
    if request.hostfile is None:
        return Access((Host(LOCALHOST, _local_slots()),), remote=False, folder=folder)
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    exported = launcher_environment(environment, [Path.home() / name, folder / name])
    paths = [str(folder), *filter(None, [exported.get("PYTHONPATH")])]
    exported["PYTHONPATH"] = ":".join(paths)
    hosts = read_hostfile(request.hostfile)
    return Access(hosts, remote=True, folder=folder, environment=exported, ssh_port=request.ssh_port)


def _seen(access: Access, host: Host, first: Host, facts: Mapping[str, Mapping[str, Any]]) -> Seen:
    return Seen(
        host,
        facts[host.name],
        reference=first.name,
        reference_facts=facts[first.name],
        requirements=_requirements(),
        variables=access.environment,
        several=len(access.hosts) > 1,
    )


def _local_slots() -> int:
    """As the deepspeed launcher counts without a hostfile: every GPU, or one process."""
    rows = probe.gpus()
    return len(rows["devices"]) if rows and rows["devices"] else 1


def _requirements() -> list[str]:
    """What megagpt's package demands; nothing where it runs from a checkout that is not installed."""
    try:
        demanded = importlib.metadata.requires("megagpt") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [text for text in demanded if "extra ==" not in text]


def _probe(access: Access, host: Host, folders: Sequence[Path]) -> Answer:
    packages = sorted({Requirement(text).name for text in _requirements()} | {"torch", "deepspeed"})
    asked = {"packages": packages, "folders": [str(folder) for folder in folders]}
    return ask(access, host, inspect.getsource(probe), [json.dumps(asked)], PROBE_SECONDS)


def _launcher(access: Access) -> list[Finding]:
    if len(access.hosts) < 2:
        return []
    pdsh = shutil.which("pdsh")
    if pdsh is None:
        fix = "install pdsh, or start with srun, mpirun, or `deepspeed --no_ssh` on each host (see launch/)"
        return [Finding("here", "launcher", "error", "no pdsh, deepspeed's default launcher", fix)]
    return [Finding("here", "launcher", "ok", pdsh)]


def _reached(access: Access, answers: Mapping[str, Answer]) -> list[Finding]:
    found = []
    for name, answer in answers.items():
        if not answer.rows:
            fix = answer.fix or "run the same Python there by hand"
            found.append(Finding(name, "reached", "error", answer.trouble or "no answer", fix))
        elif access.remote:
            found.append(Finding(name, "reached", "ok", "ssh without a password"))
    return found


def _shared(access: Access, hosts: Sequence[Host], folders: Sequence[Path]) -> list[Finding]:
    """A token that the first host writes is read by the others: the folder is one, not several of the same name."""
    found: list[Finding] = []
    writer, readers = hosts[0], hosts[1:]
    for folder in folders:
        token = uuid.uuid4().hex
        asked = {"path": str(folder / f".megagpt_doctor_{token[:12]}"), "text": token, "seconds": 2.0}
        wrote = _token(access, writer, asked | {"token": "write"})
        if wrote != token:
            fix = "look at the mount and at its rights"
            found.append(Finding(writer.name, "shared storage", "error", f"{folder}: cannot write: {wrote}", fix))
            continue
        read = on_all(readers, lambda host, asked=asked: _token(access, host, asked | {"token": "read"}))  # type: ignore[misc]
        _token(access, writer, asked | {"token": "remove"})
        for name, text in read.items():
            if text == token:
                found.append(Finding(name, "shared storage", "ok", str(folder)))
                continue
            value = f"{folder} is not the folder that {writer.name} has there: {text or 'its file does not appear'}"
            fix = f"mount on {name} what {writer.name} has mounted"
            found.append(Finding(name, "shared storage", "error", value, fix))
    return found


def _token(access: Access, host: Host, asked: Mapping[str, Any]) -> str | None:
    answer = ask(access, host, inspect.getsource(probe), [json.dumps(asked)], TOKEN_SECONDS)
    if not answer.rows:
        return answer.trouble
    row = answer.rows[0]
    return row.get("error", row.get("text"))


def _all_reduce(access: Access, request: Request, facts: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Over all processes of all hosts; where it fails, with the first host and each other in turn, to name who."""
    hosts = access.hosts
    if sum(host.slots for host in hosts) < 2:
        return []
    address = request.master_addr or _address(facts[hosts[0].name]) if access.remote else "127.0.0.1"
    together = _run_all_reduce(access, hosts, request, address)
    if not _failed(hosts, together):
        return [Finding("all", "all-reduce", "ok", _measured(together))]
    if len(hosts) < 3:
        return _blamed(hosts, together, address, request)
    found: list[Finding] = []
    for host in hosts[1:]:
        pair = (hosts[0], host)
        of_pair = _run_all_reduce(access, pair, request, address)
        if _failed(pair, of_pair):
            found += [finding for finding in _blamed(pair, of_pair, address, request) if finding.host == host.name]
    if len(found) == len(hosts) - 1 or not found:
        whole = "with every other host" if found else "of all hosts together, though each pair does well"
        fix = (
            f"mend {hosts[0].name} first: every pair has it"
            if found
            else "look at switches and at the limits of open files"
        )
        return [Finding(hosts[0].name, "all-reduce", "error", f"fails {whole}", fix), *found]
    return found


def _address(facts: Mapping[str, Any]) -> str:
    """As the deepspeed launcher finds MASTER_ADDR: the first word of `hostname -I`."""
    return str((facts["addresses"] or [facts["hostname_address"]])[0])


def _run_all_reduce(access: Access, hosts: Sequence[Host], request: Request, address: str) -> dict[str, Answer]:
    first_ranks, world_size = {}, 0
    for host in hosts:
        first_ranks[host.name] = world_size
        world_size += host.slots
    common = {
        "world_size": world_size,
        "address": address,
        "port": request.master_port,
        "seconds": request.seconds,
    }

    def start(host: Host) -> Answer:
        asked = common | {"first_rank": first_ranks[host.name], "slots": host.slots}
        return ask(access, host, inspect.getsource(all_reduce), [json.dumps(asked)], PROBE_SECONDS + request.seconds)

    return on_all(hosts, start)


def _failed(hosts: Sequence[Host], answers: Mapping[str, Answer]) -> list[Host]:
    return [host for host in hosts if len(_rows(answers[host.name], "done")) < host.slots]


def _rows(answer: Answer, phase: str) -> list[Mapping[str, Any]]:
    return [row for row in answer.rows if row.get("phase") == phase]


def _measured(answers: Mapping[str, Answer]) -> str:
    rows = [row for answer in answers.values() for row in _rows(answer, "done")]
    latency = max(row["latency_seconds"] for row in rows)
    bandwidth = min(row["bus_bytes_per_second"] for row in rows)
    return (
        f"{len(rows)} processes over {rows[0]['backend']}: latency {latency * 1e6:,.0f} us, "
        f"bus bandwidth {bandwidth / 1e9:.2f} GB/s"
    )


def _blamed(hosts: Sequence[Host], answers: Mapping[str, Answer], address: str, request: Request) -> list[Finding]:
    """What each host says of a failed all-reduce."""
    found = []
    for host in _failed(hosts, answers):
        answer = answers[host.name]
        errors = [str(row["error"]) for row in _rows(answer, "failed")] or [answer.trouble or "it ended without a word"]
        joined = len(_rows(answer, "joined"))
        if not joined:
            where = f"{address}:{request.master_port}"
            fix = f"let {host.name} reach {where} (firewall; --master-addr, --master-port; is the port in use?)"
            value = f"cannot join at {where}: {errors[0]}"
        else:
            fix = "name the interface that joins the hosts: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in .deepspeed_env"
            value = f"joined, but the sum fails: {errors[0]}"
        found.append(Finding(host.name, "all-reduce", "error", value, fix))
    return found
