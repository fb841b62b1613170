"""Untrusted Python programs from the evaluation's side: limits in, an outcome out."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megagpt.errors import EvalError

Status = Literal["passed", "failed", "ended", "timed_out", "out_of_memory"]

PROJECT = Path(__file__).resolve().parents[2]
START = "import sys; sys.path.insert(0, sys.argv[1]); from evals.sandbox.jail import main; main()"
GRACE_SECONDS = 60.0
"""Beyond a program's own time, for the sandbox itself on a busy machine."""

HINT = (
    "the sandbox needs user namespaces: on a host see the sysctls user.max_user_namespaces and "
    "kernel.apparmor_restrict_unprivileged_userns, in a container its seccomp profile; there is no weaker mode"
)


class SandboxUnavailableError(EvalError):
    """A protection that the sandbox promises cannot be had on this host; nothing was run."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Sizes in bytes."""

    wall_seconds: int = 20
    """Generous, so that a busy machine changes no score: what computes too long ends by its CPU time."""
    cpu_seconds: int = 5
    """Of one process."""
    memory_bytes: int = 1 << 30
    """Address space of one process."""
    total_memory_bytes: int = 2 << 30
    """Resident memory of all of them; looked at ten times a second."""
    processes: int = 8
    """Processes and threads."""
    open_files: int = 64
    file_bytes: int = 16 << 20
    """Of one file."""
    folder_bytes: int = 64 << 20
    """Of the private folder, which is in memory and gone afterwards."""
    output_bytes: int = 1 << 16
    """Of what is printed; the rest is counted and dropped."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    status: Status
    """`passed` and `failed` are said by tests alone; a program without tests has `ended`."""
    detail: str
    exit_code: int | None
    """Negative: the signal that killed it. None: it did not end by itself."""
    output: str
    """stdout and stderr together."""
    output_bytes: int
    """Of all that it printed."""
    seconds: float
    protections: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """Whether this host can keep what the sandbox promises."""

    ok: bool
    reason: str = ""
    protections: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.ok:
            return f"sandbox: unavailable: {self.reason}"
        return "\n".join(["sandbox: available", *(f"  {name}: {how}" for name, how in self.protections.items())])


DEFAULT_LIMITS = Limits()


def run_program(program: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run a program from top to bottom.

    Raises:
        SandboxUnavailableError: this host cannot keep it apart.
    """
    return _run({"program": program, "tests": None}, limits)


def run_tests(program: str, *, setup: str, tests: str, entry_point: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run a program and tests of one of its functions, in a process that the program cannot reach.

    Arguments and values cross as plain data (numbers, texts, lists, tuples, sets, dicts); a value of another type
    equals nothing.

    Args:
        program: the untrusted text.
        setup: run by the tests' process first: what the tests themselves need of the problem's text.
        tests: run next, with `entry_point` calling the program's function; passed if nothing is raised.
        entry_point: name of the function.
        limits: of the program.

    Raises:
        SandboxUnavailableError: this host cannot keep it apart.
    """
    return _run({"program": program, "setup": setup, "tests": tests, "entry_point": entry_point}, limits)


@functools.cache
def probe() -> Probe:
    """Build a sandbox with every protection and run a program in it."""
    if sys.platform != "linux":
        return Probe(ok=False, reason=f"it is built on Linux's namespaces, and this is {sys.platform}")
    try:
        outcome = run_program("print(6 * 7)")
    except SandboxUnavailableError as error:
        return Probe(ok=False, reason=str(error))
    if (outcome.exit_code, outcome.output) != (0, "42\n"):
        return Probe(ok=False, reason=f"a trial program did not work: {outcome.detail}: {outcome.output}")
    return Probe(ok=True, protections=outcome.protections)


def _run(job: dict[str, Any], limits: Limits) -> Outcome:
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    content = {
        **job,
        "limits": asdict(limits),
        "parent": os.getpid(),
        "python": python,
        "python_folder": os.path.realpath(sys.base_prefix),
    }
    answer = _ask_keeper(python, json.dumps(content).encode(), limits.wall_seconds + GRACE_SECONDS)
    if answer["status"] == "refused":
        raise SandboxUnavailableError(f"{answer['detail']}; {HINT}")
    return Outcome(**answer)


def _ask_keeper(python: str, content: bytes, seconds: float) -> dict[str, Any]:
    """Start the keeper, whose end ends everything below it."""
    process = subprocess.Popen(
        [python, "-I", "-S", "-X", "utf8", "-c", START, str(PROJECT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": "/usr/bin:/bin"},
        cwd="/",
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(content, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise EvalError(f"the sandbox gave no answer for {seconds:.0f} s; is the machine overloaded?") from None
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    try:
        answer: dict[str, Any] = json.loads(stdout)
    except ValueError:
        tail = stderr.decode("utf-8", "replace").strip()[-500:]
        raise EvalError(f"the sandbox ended with code {process.returncode} and no answer: {tail}") from None
    return answer
