"""What a host's facts mean: each check is a function from facts to findings, and touches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from megagpt.doctor.hosts import Host

Status = Literal["ok", "warning", "error"]

MAX_CLOCK_SKEW_SECONDS = 2.0
"""Beyond this, times in logs, checkpoints and `make`-like rebuilds of several hosts mislead."""
MIN_SHM_BYTES, MIN_DISK_BYTES = 2 * 2**30, 10 * 2**30
"""/dev/shm carries NCCL's and gloo's buffers between processes of a host (Docker gives 64 MiB); a disk, checkpoints."""
MIN_MEMLOCK_BYTES = 2**30
"""InfiniBand pins memory; a small limit makes NCCL fail at start."""
LOCK_SECONDS = 60.0
"""A younger lock may be held by a build on another host that shares the folder; building takes about a minute."""
BUSY_MIB = 1024.0
"""A GPU that holds more than this without a process that we see is in use, or keeps what a dead process had."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at on one host."""

    host: str
    check: str
    status: Status
    value: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """One host's facts, and what they are compared with."""

    host: Host
    facts: Mapping[str, Any]
    reference: str
    """The host whose versions the others must have: the first."""
    reference_facts: Mapping[str, Any]
    requirements: Sequence[str]
    """What megagpt's package demands, `torch==2.13.0` and so on."""
    variables: Mapping[str, str]
    """What the launcher exports: NCCL_SOCKET_IFNAME and the like."""
    several: bool
    """There is more than one host."""


def judge(seen: Seen) -> list[Finding]:
    """All findings about one host that its own facts and the first host's give."""
    return [
        Finding(seen.host.name, name, status, value, fix)
        for name, check in _CHECKS.items()
        for status, value, fix in check(seen)
    ]


Verdict = tuple[Status, str, str]


def _python(seen: Seen) -> Iterator[Verdict]:
    version, wanted = seen.facts["python"]["version"], seen.reference_facts["python"]["version"]
    if version != wanted:
        yield "error", version, f"{seen.reference} has {wanted}; share one environment between the hosts"
    elif not Version("3.11") <= Version(version) < Version("3.13"):
        yield "error", version, "megagpt needs Python 3.11 or 3.12"
    else:
        yield "ok", version, ""


def _packages(seen: Seen) -> Iterator[Verdict]:
    versions, reference = seen.facts["packages"], seen.reference_facts["packages"]
    wrong = list(_unmet(versions, seen.requirements))
    if wrong:
        yield "error", ", ".join(wrong), "install megagpt's own versions: make install"
        return
    other = [f"{name} {versions[name]}" for name in versions if versions[name] != reference.get(name)]
    if other:
        theirs = ", ".join(f"{name.split()[0]} {reference.get(name.split()[0])}" for name in other)
        yield "error", ", ".join(other), f"{seen.reference} has {theirs}; share one environment between the hosts"
        return
    yield "ok", f"torch {versions.get('torch')}, deepspeed {versions.get('deepspeed')}", ""


def _unmet(versions: Mapping[str, str | None], requirements: Iterable[str]) -> Iterator[str]:
    for text in requirements:
        wanted = Requirement(text)
        version = versions.get(wanted.name)
        if version is None:
            yield f"{wanted.name} is not installed (wanted{wanted.specifier})"
        elif not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name} {version} (wanted {wanted.specifier})"


def _source(seen: Seen) -> Iterator[Verdict]:
    source, reference = seen.facts["source"], seen.reference_facts["source"]
    if source is None:
        yield (
            "error",
            "megagpt is not importable",
            "install it, or start from a checkout at the same path on every host",
        )
    elif reference is not None and source["hash"] != reference["hash"]:
        yield (
            "error",
            f"{source['path']} is {source['hash']}",
            f"{seen.reference} has {reference['hash']}; bring both to the same commit",
        )
    else:
        yield "ok", f"{source['path']} {source['hash']}", ""


def _compiler(seen: Seen) -> Iterator[Verdict]:
    if seen.facts["compiler"] is None:
        yield "error", "no C++ compiler", "DeepSpeed builds its op at first use: install g++"
    elif seen.facts["ninja"] is None:
        yield "error", "no ninja", "install it into the environment: pip install ninja"
    else:
        yield "ok", seen.facts["compiler"].partition(": ")[2], ""


def _locks(seen: Seen) -> Iterator[Verdict]:
    for lock in seen.facts["locks"]:
        age = f"{lock['path']} ({lock['age_seconds']:.0f} s old)"
        if lock["held_by"] is not None:
            yield "warning", age, f"process {lock['held_by']} builds there; a start now waits for it"
        elif lock["age_seconds"] < LOCK_SECONDS:
            yield "warning", age, "perhaps another host builds there; look again in a minute"
        else:
            yield "error", age, f"its builder has died and every start waits for it without end: rm {lock['path']}"
    if not seen.facts["locks"]:
        yield "ok", "none", ""


def _disk(seen: Seen) -> Iterator[Verdict]:
    fine = []
    for folder, space in seen.facts["disk"].items():
        wanted = MIN_SHM_BYTES if folder == "/dev/shm" else MIN_DISK_BYTES
        if space is None:
            yield "error", f"no folder {folder}", "mount it there, at the same path as on the other hosts"
            continue
        free = f"{folder}: {_gib(space['free_bytes'])} free of {_gib(space['total_bytes'])}"
        if not space["writable"]:
            yield "error", f"{folder}: not writable", "give the user that trains the right to write there"
        elif space["free_bytes"] < wanted:
            grow = "make room, or enlarge it (docker: --shm-size)" if folder == "/dev/shm" else "make room"
            yield "warning", free, grow
        else:
            fine.append(free)
    if fine:
        yield "ok", "; ".join(fine), ""


def _network(seen: Seen) -> Iterator[Verdict]:
    names = ", ".join(f"{name} {address}" for name, address in seen.facts["interfaces"].items() if name != "lo")
    wrong = [
        (variable, value)
        for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        if (value := seen.variables.get(variable)) and not _matches(value, seen.facts["interfaces"])
    ]
    for variable, value in wrong:
        yield "error", f"{variable}={value}, but there is {names or 'no interface'}", "name one that every host has"
    if wrong:
        return
    if seen.several and not names:
        yield "error", "no interface but lo", "bring the network up"
    elif seen.several and "GLOO_SOCKET_IFNAME" not in seen.variables and _loops(seen.facts):
        yield (
            "warning" if seen.facts["gpus"] else "error",
            f"its own name leads to {seen.facts['hostname_address']}, where gloo would listen",
            f"write GLOO_SOCKET_IFNAME={next(name for name in seen.facts['interfaces'] if name != 'lo')} "
            "into .deepspeed_env, or mend /etc/hosts",
        )
    else:
        yield "ok", names or "lo", ""


def _matches(value: str, interfaces: Iterable[str]) -> bool:
    """NCCL's syntax: a list of beginnings, `=` for whole names, `^` for all but these."""
    present = [name for name in interfaces if name != "lo"]
    if value.startswith("^"):
        return any(not name.startswith(tuple(value[1:].split(","))) for name in present)
    if value.startswith("="):
        return any(name in value[1:].split(",") for name in present)
    return any(name.startswith(tuple(value.split(","))) for name in present)


def _loops(facts: Mapping[str, Any]) -> bool:
    address = facts["hostname_address"]
    return address is None or str(address).startswith("127.")


def _clock(seen: Seen) -> Iterator[Verdict]:
    """The host's clock is ahead of ours by no less than `least` and no more than `most`.

    Its program began after we started it, and ended before we heard of that.
    """
    (start, end), (our_start, our_end) = seen.facts["clock"], seen.facts["our_clock"]
    least, most = end - our_end, start - our_start
    if least > MAX_CLOCK_SKEW_SECONDS:
        yield "error", f"at least {least:.1f} s ahead of this host's", "start chronyd or ntpd on both"
    elif most < -MAX_CLOCK_SKEW_SECONDS:
        yield "error", f"at least {-most:.1f} s behind this host's", "start chronyd or ntpd on both"
    elif seen.several and seen.facts["clock_is_set"] is False:
        yield "warning", "right as far as can be seen, but kept by nothing", "start chronyd or ntpd there"
    else:
        yield "ok", "right as far as can be seen", ""


def _torch(seen: Seen) -> Iterator[Verdict]:
    torch, gpus = seen.facts["torch"], seen.facts["gpus"]
    if "error" in torch:
        yield "error", f"torch does not load: {torch['error']}", "install the environment anew: make install"
        return
    if gpus and gpus["devices"]:
        trouble = _driver_trouble(torch, gpus)
        if trouble:
            yield "error", *trouble
            return
    ours, theirs = _cuda_words(seen.facts), _cuda_words(seen.reference_facts)
    if ours != theirs:
        yield "error", ours, f"{seen.reference} has {theirs}; NCCL of two versions does not talk"
    else:
        yield "ok", ours, ""


def _driver_trouble(torch: Mapping[str, Any], gpus: Mapping[str, Any]) -> tuple[str, str] | None:
    if torch["cuda"] is None:
        return "torch is built for the CPU, but there are GPUs", "install torch's CUDA build"
    driver = gpus["driver_cuda"]
    # A driver runs every minor version of its major one. Source: CUDA Compatibility guide, minor version compatibility.
    if driver and int(driver.split(".")[0]) < int(torch["cuda"].split(".")[0]):
        return (
            f"torch wants CUDA {torch['cuda']}, the driver {gpus['driver']} has {driver}",
            "update the driver, or install torch for this CUDA",
        )
    if not torch["devices"]:
        return "nvidia-smi sees GPUs, torch sees none", "look at CUDA_VISIBLE_DEVICES and at `dmesg` (Xid)"
    return None


def _cuda_words(facts: Mapping[str, Any]) -> str:
    torch = facts["torch"]
    if not torch.get("cuda"):
        return "CPU build"
    driver = f", driver {facts['gpus']['driver']}" if facts["gpus"] else ""
    return f"CUDA {torch['cuda']}, NCCL {torch['nccl']}{driver}"


def _slots(seen: Seen) -> Iterator[Verdict]:
    gpus = seen.facts["gpus"]["devices"] if seen.facts["gpus"] else []
    if not gpus and seen.facts["torch"].get("cuda") and seen.several:
        yield "error", "no GPU", "look at nvidia-smi there; or take the host out of the hostfile"
    elif not gpus:
        status: Status = "warning" if seen.host.slots > seen.facts["cores"] else "ok"
        yield status, f"no GPU; {seen.facts['cores']} CPU cores for {seen.host.slots} processes", "give it fewer slots"
    elif seen.host.slots > len(gpus):
        yield "error", f"{len(gpus)} GPUs for {seen.host.slots} slots", f"write slots={len(gpus)} into the hostfile"
    else:
        busy = [gpu for gpu in gpus[: seen.host.slots] if gpu["pids"] or (gpu["used_mib"] or 0) > BUSY_MIB]
        for gpu in busy:
            who = f"processes {', '.join(map(str, gpu['pids']))}" if gpu["pids"] else "no process that shows"
            yield (
                "error",
                f"GPU {gpu['index']} is in use: {gpu['used_mib']} of {gpu['total_mib']} MiB, {who}",
                "end them, or leave it out with --exclude",
            )
        if not busy:
            yield "ok", f"{len(gpus)} x {gpus[0]['name']} free, {seen.host.slots} slots", ""


def _memlock(seen: Seen) -> Iterator[Verdict]:
    limit = seen.facts["memlock_bytes"]
    small = 0 <= limit < MIN_MEMLOCK_BYTES
    if small and seen.several and seen.facts["gpus"]:
        yield "warning", f"max locked memory {limit} bytes", "InfiniBand needs `ulimit -l unlimited` (limits.conf)"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


_CHECKS: dict[str, Callable[[Seen], Iterator[Verdict]]] = {
    "python": _python,
    "packages": _packages,
    "megagpt": _source,
    "compiler": _compiler,
    "op build locks": _locks,
    "disk": _disk,
    "network": _network,
    "clock": _clock,
    "torch": _torch,
    "slots": _slots,
    "locked memory": _memlock,
}
