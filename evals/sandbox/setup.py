"""The steps that build the sandbox around a process, each named, in order; standard library only.

Every step is needed unless it says otherwise: where one fails, nothing is run.
"""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evals.sandbox import kernel, seccomp

INNER_ID = 1000
"""User and group inside."""
NOBODY = 65534
"""User and group outside where root starts the sandbox: limits of processes do not bind root."""
FOLDER = "/tmp"
ROOT = "/proc"
"""Where the new root is built before it becomes /: a folder that every Linux has, and that nothing is taken from.
It is covered in the new mount namespace alone, which is gone with its last process: nothing is left on the host,
however the evaluation ends."""
DEVICES = ("null", "zero", "full", "random", "urandom")
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin")
SYSTEM_FILES = ("/etc/ld.so.cache",)


class Refused(Exception):  # noqa: N818 - it says what is
    """A protection that cannot be had here."""


@contextmanager
def step(name: str) -> Iterator[None]:
    """Say which protection it is that the kernel refuses."""
    try:
        yield
    except OSError as error:
        raise Refused(f"{name}: {error.strerror or error}") from None


def is_full_root(uid: int, uid_map: str) -> bool:
    """Whether this is root that may become anybody, and not the one user of a container without root.

    Args:
        uid: effective.
        uid_map: content of /proc/self/uid_map, lines `first inside, first outside, number`.
    """
    ranges = [[int(word) for word in line.split()] for line in uid_map.splitlines()]
    return uid == 0 and any(first <= NOBODY < first + number for first, _, number in ranges)


def identity_map(outer_id: int, *, is_root: bool) -> str:
    """Content of uid_map and gid_map: root's own id is for the setup and given up before the program starts."""
    return f"0 {outer_id} 1\n{INNER_ID} {NOBODY} 1\n" if is_root else f"{INNER_ID} {outer_id} 1\n"


def build_root(python_folder: str, folder_bytes: int) -> None:
    """A file system with Python and the system's libraries, read-only, and one writable folder in memory.

    Args:
        python_folder: the interpreter's own, such as /usr or a pyenv version.
        folder_bytes: the most that the writable folder holds.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("root", ROOT, "tmpfs", kernel.MS_NOSUID, "mode=755,size=1m,nr_inodes=1k")
    folders = [name for name in SYSTEM_FOLDERS if Path(name).is_dir() and not Path(name).is_symlink()]
    if not any(python_folder == name or python_folder.startswith(f"{name}/") for name in folders):
        folders.append(python_folder)
    for source in folders:
        Path(ROOT + source).mkdir(parents=True)
        kernel.mount(source, ROOT + source, None, kernel.MS_BIND | kernel.MS_REC)
        kernel.make_read_only(ROOT + source, below_too=True)
    for link in SYSTEM_FOLDERS:
        if Path(link).is_symlink():
            Path(ROOT + link).symlink_to(Path(link).readlink())
    for source in (*SYSTEM_FILES, *(f"/dev/{name}" for name in DEVICES)):
        if Path(source).exists():
            target = Path(ROOT + source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
            kernel.mount(source, str(target), None, kernel.MS_BIND)
    Path(ROOT + FOLDER).mkdir()
    options = f"mode=1777,size={folder_bytes},nr_inodes=1k"
    kernel.mount("folder", ROOT + FOLDER, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)
    kernel.change_root(ROOT)
    kernel.make_read_only("/", below_too=False)


def confine(job: dict[str, Any]) -> dict[str, str]:
    """All that holds for the tester and the program alike; called as the first process of new namespaces.

    Returns:
        Protection -> how it is had.

    Raises:
        Refused: one of them cannot be had.
    """
    abi = kernel.landlock_abi()
    os.umask(0o022)
    os.setsid()
    with step("a file system of its own"):
        build_root(job["python_folder"], job["limits"]["folder_bytes"])
    with step("a user without rights"):
        if os.getuid() != INNER_ID:
            os.setresgid(INNER_ID, INNER_ID, INNER_ID)
            os.setresuid(INNER_ID, INNER_ID, INNER_ID)
        kernel.drop_capabilities()
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if abi:
        with step("Landlock"):
            kernel.restrict_files(abi, FOLDER)
    machine = os.uname().machine
    if not seccomp.is_known(machine):
        raise Refused(f"seccomp: no table of system calls for {machine}")
    with step("seccomp"):
        seccomp.install()
    return {
        "user namespace": "no rights outside; inside no capabilities",
        "process namespace": "sees and signals only what it started; all of it ends with the program",
        "network namespace": "no device is up",
        "mount namespace": f"Python and system libraries read-only; {FOLDER} in memory; nothing else is there",
        "ipc and uts namespaces": "no shared memory, no host name",
        "seccomp": "no sockets but unix ones, no namespaces, no tracing, no memory that is not counted",
        "landlock": f"ABI {abi}: a second lock on files" if abi else "not in this kernel; the mount namespace stands",
    }


def limit(limits: dict[str, int]) -> None:
    """Limits of the program's process.

    Raises:
        Refused: one of them cannot be had.
    """
    cpu = limits["cpu_seconds"]
    wanted = {
        resource.RLIMIT_AS: (limits["memory_bytes"],) * 2,
        resource.RLIMIT_CPU: (cpu, cpu + 1),
        resource.RLIMIT_FSIZE: (limits["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (limits["open_files"],) * 2,
        resource.RLIMIT_NPROC: (limits["processes"] + 1,) * 2,  # the tester is one
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
    }
    with step("resource limits"):
        for name, values in wanted.items():
            try:
                resource.setrlimit(name, values)
            except ValueError as error:  # above a limit that holds here already
                raise OSError(0, str(error)) from None
