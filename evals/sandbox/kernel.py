"""Linux's calls that Python's standard library does not have, through ctypes; standard library only.

Source of all numbers: Linux, include/uapi/linux/{sched,mount,prctl,capability,landlock}.h.
"""

from __future__ import annotations

import ctypes
import os

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP

MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
AT_FDCWD, AT_RECURSIVE, AT_EMPTY_PATH = -100, 0x8000, 0x1000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAPABILITY_VERSION_3 = 0x20080522

SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_MOUNT_SETATTR, SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 442, 444, 445, 446

LANDLOCK_VERSION = 1
LANDLOCK_RULE_PATH = 1
FS_EXECUTE, FS_READ_FILE, FS_READ_DIR = 1 << 0, 1 << 2, 1 << 3
FS_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Landlock ABI -> every right over files that it knows; later ones know no more than 5."""
NET_TCP = 0b11
SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *arguments: object) -> int:
    return _check(_libc.syscall(ctypes.c_long(number), *arguments), what)


def unshare(flags: int) -> None:
    """New namespaces for this process (for its children, of processes).

    Raises:
        OSError: the kernel or a policy forbids it, as do all functions here.
    """
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def prctl(option: int, value: int = 0) -> None:
    """Set something of this process."""
    words = [ctypes.c_ulong(word) for word in (value, 0, 0, 0)]
    _check(_libc.prctl(ctypes.c_int(option), *words), f"prctl {option}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Attach a file system, or another place of this one, to `target`."""
    _check(
        _libc.mount(
            source.encode(),
            target.encode(),
            None if kind is None else kind.encode(),
            ctypes.c_ulong(flags),
            None if data is None else data.encode(),
        ),
        f"mount {target}",
    )


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


def make_read_only(target: str, *, below_too: bool) -> None:
    """Nothing can be written through this mount, and no file of it gives rights when run."""
    attributes = _MountAttributes(attr_set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
    _syscall(
        f"mount_setattr {target}",
        SYS_MOUNT_SETATTR,
        ctypes.c_int(AT_FDCWD),
        ctypes.c_char_p(target.encode()),
        ctypes.c_uint(AT_RECURSIVE if below_too else 0),
        ctypes.byref(attributes),
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def change_root(folder: str) -> None:
    """`folder`, a mount point, becomes /; what was mounted before is out of reach."""
    os.chdir(folder)
    # New and old root in one place: the old one lies on top and is taken away. Source: pivot_root(2), notes.
    dot = ctypes.c_char_p(b".")
    _syscall("pivot_root", SYS_PIVOT_ROOT[os.uname().machine], dot, dot)
    _check(_libc.umount2(b".", ctypes.c_int(MNT_DETACH)), "umount of the old root")
    os.chdir("/")


class _CapabilityHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapabilityData(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


def drop_capabilities() -> None:
    """None is left, and no program that is run later gives any back."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = _CapabilityHeader(CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(ctypes.byref(header), ctypes.byref((_CapabilityData * 2)())), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def landlock_abi() -> int:
    """Landlock's version; 0 where the kernel has none or it is switched off."""
    number = _libc.syscall(
        ctypes.c_long(SYS_LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(LANDLOCK_VERSION)
    )
    return max(0, int(number))


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("handled_access_fs", "handled_access_net", "scoped")]


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def restrict_files(abi: int, writable: str) -> None:
    """Reading and running everywhere, writing below `writable` alone; no TCP, no signal out, where the ABI knows them.

    Args:
        abi: what `landlock_abi` says; 1 or more.
        writable: folder.
    """
    everything = FS_ALL_BY_ABI[min(abi, 5)]
    rules = _Ruleset(everything, NET_TCP if abi >= 4 else 0, SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = _syscall(
        "landlock_create_ruleset",
        SYS_LANDLOCK_CREATE,
        ctypes.byref(rules),
        ctypes.c_size_t(size),
        ctypes.c_uint(0),
    )
    for path, rights in (("/", FS_EXECUTE | FS_READ_FILE | FS_READ_DIR), (writable, everything)):
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = _PathRule(rights, folder)
        _syscall(
            f"landlock_add_rule {path}",
            SYS_LANDLOCK_ADD,
            ctypes.c_int(ruleset),
            ctypes.c_int(LANDLOCK_RULE_PATH),
            ctypes.byref(rule),
            ctypes.c_uint(0),
        )
        os.close(folder)
    # /dev/null and its like are opened for writing.
    _allow_devices(ruleset, everything)
    _syscall("landlock_restrict_self", SYS_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0))
    os.close(ruleset)


def _allow_devices(ruleset: int, everything: int) -> None:
    folder = os.open("/dev", os.O_PATH | os.O_CLOEXEC)
    write_file, ioctl, truncate = 1 << 1, 1 << 15, 1 << 14
    rights = (FS_READ_FILE | FS_READ_DIR | write_file | ioctl | truncate) & everything
    rule = _PathRule(rights, folder)
    _syscall(
        "landlock_add_rule /dev",
        SYS_LANDLOCK_ADD,
        ctypes.c_int(ruleset),
        ctypes.c_int(LANDLOCK_RULE_PATH),
        ctypes.byref(rule),
        ctypes.c_uint(0),
    )
    os.close(folder)
