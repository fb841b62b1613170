"""A seccomp filter: calls that the program may not make, whatever its namespaces allow. Standard library only.

It closes what namespaces leave open: sockets of families that network namespaces do not part (vsock reaches the host of
a virtual machine), memory that no limit of a process counts (memfd, System V), new namespaces, and the parts of the
kernel that untrusted code has no use for.

Source: Linux, include/uapi/linux/{seccomp,filter,audit}.h; numbers of calls from its tables for both machines.
"""

from __future__ import annotations

import ctypes
import errno
import os

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
OFFSET_NUMBER, OFFSET_ARCH, OFFSET_FIRST_ARGUMENT = 0, 4, 16
X32_BIT = 0x40000000
AF_UNIX = 1
NEW_NAMESPACE_BITS = 0x7E020000

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SOCKET = {"x86_64": 41, "aarch64": 198}
CLONE = {"x86_64": 56, "aarch64": 220}
CLONE3 = 435
"""Its flags lie in memory, where no filter sees them; libc goes on with clone where it is told that there is none."""

_REFUSED_X86 = (
    "101 310 311 312 272 308 165 166 155 161 321 298 323 248 249 250 246 320 175 313 176 319 29 64 68 240 303"
)
_REFUSED_ARM = "117 270 271 272 97 268 40 39 41 51 280 241 282 217 218 219 104 294 105 273 106 279 194 190 186 180 264"
REFUSED = {
    "x86_64": [int(word) for word in f"{_REFUSED_X86} 304 300 163 167 168 169 103 179 227 164 159".split()],
    "aarch64": [int(word) for word in f"{_REFUSED_ARM} 265 262 89 224 225 142 116 60 112 170 171".split()],
}
"""In this order: ptrace, process_vm_readv and writev, kcmp, unshare, setns, mount, umount2, pivot_root, chroot, bpf,
perf_event_open, userfaultfd, add_key, request_key, keyctl, kexec_load and file_load, init_module, finit_module,
delete_module; memfd_create, shmget, semget, msgget, mq_open, name_to_handle_at, open_by_handle_at, fanotify_init, acct,
swapon, swapoff, reboot, syslog, quotactl, clock_settime, settimeofday, adjtimex."""
REFUSED_EVERYWHERE = (425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 442, 447)
"""io_uring (setup, enter, register), open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, pidfd_getfd,
mount_setattr, memfd_secret."""


class _Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


def is_known(machine: str) -> bool:
    """Whether there is a table for this kind of processor (`uname -m`)."""
    return machine in ARCHITECTURES


def install() -> None:
    """Filter the calls of this process and all that it starts, for good; PR_SET_NO_NEW_PRIVS must be set.

    Raises:
        OSError: the kernel has no filters, or forbids this one.
    """
    instructions = filter_for(os.uname().machine)
    array = (_Instruction * len(instructions))(*[_Instruction(*instruction) for instruction in instructions])
    program = _Program(len(instructions), array)
    libc = ctypes.CDLL(None, use_errno=True)
    mode = ctypes.c_ulong(SECCOMP_MODE_FILTER)
    if libc.prctl(PR_SET_SECCOMP, mode, ctypes.byref(program), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def filter_for(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter's instructions: (code, jump if true, jump if false, k)."""
    refuse = (RETURN, 0, 0, ERRNO | errno.EPERM)
    allow = (RETURN, 0, 0, ALLOW)
    program = [
        (LOAD, 0, 0, OFFSET_ARCH),
        (JUMP_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, OFFSET_NUMBER),
        (JUMP_AT_LEAST, 0, 1, X32_BIT),
        refuse,
    ]
    for number in (*REFUSED[machine], *REFUSED_EVERYWHERE):
        program += [(JUMP_EQUAL, 0, 1, number), refuse]
    program += [(JUMP_EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERRNO | errno.ENOSYS)]
    program += [(JUMP_EQUAL, 0, 4, CLONE[machine]), (LOAD, 0, 0, OFFSET_FIRST_ARGUMENT)]
    program += [(JUMP_ANY_BIT, 0, 1, NEW_NAMESPACE_BITS), refuse, allow]
    program += [(JUMP_EQUAL, 0, 4, SOCKET[machine]), (LOAD, 0, 0, OFFSET_FIRST_ARGUMENT)]
    program += [(JUMP_EQUAL, 1, 0, AF_UNIX), refuse, allow]
    return [*program, allow]
