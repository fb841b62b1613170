"""The process between the evaluation and an untrusted program. Standard library only; started by run.py.

    keeper (this process)       reads the job from stdin, watches time and memory, keeps the output, writes one answer
     '- outer                   makes the namespaces; waits
         '- tester              process 1 inside: builds the sandbox, then runs the tests; it ends, and all inside ends
             '- program         the untrusted one, with what it starts

Each of them is killed by the kernel when the one above is gone. The tester cannot be signalled or read by the program:
the kernel guards process 1, it cannot be dumped, and the calls for it are filtered.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from evals.sandbox import driver, kernel, setup, tester

WATCH_SECONDS = 0.1
SETUP_SECONDS = 30.0
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": setup.FOLDER, "TMPDIR": setup.FOLDER, "LANG": "C.UTF-8"}


def main() -> None:
    """One job from stdin, one answer to stdout."""
    job = json.load(sys.stdin.buffer)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        return
    kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
    job["is_root"] = setup.is_full_root(os.geteuid(), Path("/proc/self/uid_map").read_text())
    with suppress(OSError):  # the kernel shall take the sandbox first where memory runs out; not promised
        Path("/proc/self/oom_score_adj").write_text("1000")
    answer = Keeper(job, Path(driver.__file__).read_text(encoding="utf-8")).run()
    os.write(1, json.dumps(answer).encode())


class Keeper:
    """Outside: starts, watches and ends."""

    def __init__(self, job: dict[str, Any], driver_source: str) -> None:
        self.job = job
        self.driver_source = driver_source
        self.limits: dict[str, int] = job["limits"]
        self.started = self.deadline = 0.0
        self.protections: dict[str, str] = {}
        """Empty until the sandbox stands."""
        self.report = b""
        """Lines of JSON from outer and tester."""
        self.output = b""
        self.output_bytes = 0
        self.tester_pid: int | None = None
        self.go_write = -1

    def run(self) -> dict[str, Any]:
        """Answer: `refused`, or status, detail, exit_code, output, output_bytes, seconds, protections."""
        go_read, self.go_write = os.pipe()
        report_read, report_write = os.pipe()
        output_read, output_write = os.pipe()
        outer_pid = os.fork()
        if outer_pid == 0:
            for descriptor in (self.go_write, report_read, output_read):
                os.close(descriptor)
            _outer(self.job, self.driver_source, go_read, report_write, output_write)
        for descriptor in (go_read, report_write, output_write):
            os.close(descriptor)
        try:
            answer = self._watch(outer_pid, report_read, output_read)
        except setup.Refused as refused:
            answer = self._answer("refused", str(refused))
        finally:
            self._end_all(outer_pid)
        self._drain(output_read)
        return {
            **answer,
            "output": self.output.decode("utf-8", "backslashreplace"),
            "output_bytes": self.output_bytes,
        }

    def _watch(self, outer_pid: int, report: int, output: int) -> dict[str, Any]:
        """Until there is a result, no time or no memory is left."""
        self.started = time.monotonic()
        self.deadline = self.started + SETUP_SECONDS
        open_pipes = {report, output}
        next_look = self.started + WATCH_SECONDS
        while (now := time.monotonic()) < self.deadline:
            wait = max(0.0, min(self.deadline, next_look) - now)
            ready, _, _ = select.select(list(open_pipes), [], [], wait)
            if output in ready and not self._keep_output(output):
                open_pipes.discard(output)
            if report in ready and (result := self._hear(outer_pid, report)) is not None:
                return self._answer(**result)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + WATCH_SECONDS
                if self.protections and resident_bytes(outer_pid) > self.limits["total_memory_bytes"]:
                    return self._answer("out_of_memory", "all processes together")
        if not self.protections:
            return self._answer("refused", f"it was not built within {SETUP_SECONDS:.0f} s")
        return self._answer("timed_out", f"{self.limits['wall_seconds']} s are over")

    def _hear(self, outer_pid: int, report: int) -> dict[str, Any] | None:
        """Do what outer and tester wait for; the result once there is one."""
        for line in self._read_report(report):
            if "unshared" in line:
                self._write_maps(outer_pid)
            elif "tester" in line:
                self.tester_pid = line["tester"]
            elif "protections" in line:
                self.protections = line["protections"]
                self.started = time.monotonic()
                self.deadline = self.started + self.limits["wall_seconds"]
                os.write(self.go_write, b"2")
            else:
                return line
        return None

    def _answer(self, status: str, detail: str, exit_code: int | None = None) -> dict[str, Any]:
        return {
            "status": status,
            "detail": detail,
            "exit_code": exit_code,
            "seconds": time.monotonic() - self.started,
            "protections": self.protections,
        }

    def _read_report(self, report: int) -> list[dict[str, Any]]:
        content = os.read(report, 1 << 16)
        if not content:
            return [{"status": "ended", "detail": "the sandbox ended without a result"}]
        self.report += content
        *lines, self.report = self.report.split(b"\n")
        return [json.loads(line) for line in lines]

    def _write_maps(self, outer_pid: int) -> None:
        """Give the new user namespace its ids; the outer process waits for it."""
        folder, is_root = Path(f"/proc/{outer_pid}"), self.job["is_root"]
        with setup.step("ids of the user namespace"):
            (folder / "setgroups").write_text("deny")
            (folder / "uid_map").write_text(setup.identity_map(os.geteuid(), is_root=is_root))
            (folder / "gid_map").write_text(setup.identity_map(os.getegid(), is_root=is_root))
        os.write(self.go_write, b"1")

    def _keep_output(self, output: int) -> bool:
        """The first bytes; the rest is counted. False at the end."""
        content = os.read(output, 1 << 16)
        self.output_bytes += len(content)
        room = self.limits["output_bytes"] - len(self.output)
        self.output += content[: max(0, room)]
        return bool(content)

    def _drain(self, output: int) -> None:
        while select.select([output], [], [], 0)[0] and self._keep_output(output):
            pass

    def _end_all(self, outer_pid: int) -> None:
        """Kill process 1 inside, which kills all inside, and wait until the kernel has done so."""
        for pid in (self.tester_pid, outer_pid):
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while True:
                os.wait()


def resident_bytes(root: int) -> int:
    """Memory in use by a process and all below it; pages that they share count for each."""
    parents: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = (int(fields[1]), int(fields[21]))
    total, level = 0, {root}
    while level:
        total += sum(parents[pid][1] for pid in level if pid in parents)
        level = {pid for pid, (parent, _) in parents.items() if parent in level}
    return total * os.sysconf("SC_PAGE_SIZE")


def _tell(report: int, content: dict[str, Any]) -> None:
    os.write(report, json.dumps(content).encode() + b"\n")


def _outer(job: dict[str, Any], driver_source: str, go: int, report: int, output: int) -> NoReturn:
    """New namespaces, then a child that is process 1 of them."""
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        with setup.step("namespaces"):
            if job["is_root"]:
                os.setgroups([])
            kernel.unshare(kernel.NAMESPACES)
        _tell(report, {"unshared": True})
        if os.read(go, 1) == b"1":
            pid = os.fork()
            if pid == 0:
                _inner(job, driver_source, go, report, output)
            _tell(report, {"tester": pid})
            os.close(report)
            os.close(output)
            os.waitpid(pid, 0)
    except setup.Refused as refused:
        _tell(report, {"status": "refused", "detail": str(refused)})
    finally:
        os._exit(0)


def _inner(job: dict[str, Any], driver_source: str, go: int, report: int, output: int) -> NoReturn:
    """Process 1: confines itself, starts the program, tests it."""
    result: dict[str, Any] = {"status": "ended", "detail": "the tester failed"}
    try:
        sys.set_int_max_str_digits(0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 gets no signal from inside that it has no handler for
        protections = setup.confine(job)
        _tell(report, {"protections": protections})
        if os.read(go, 1) != b"2":
            os._exit(0)
        for descriptor in (go, 0, 1, 2):
            os.close(descriptor)
        for _ in range(3):
            os.open("/dev/null", os.O_RDWR)
        pid, requests, replies = _start_program(job, driver_source, output)
        if job["tests"] is None:
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            result = {"status": "ended", "detail": _how_it_ended(code), "exit_code": code}
        else:
            result = tester.run_tests(tester.Channel(requests, replies), job)
            if result["status"] == "ended":
                result = {**result, **_exit_of(pid, result["detail"])}
        if result.get("exit_code") == -signal.SIGXCPU:
            result["status"] = "timed_out"
    except setup.Refused as refused:
        result = {"status": "refused", "detail": str(refused)}
    except BaseException as error:  # noqa: BLE001 - told, and the process ends
        result = {"status": "ended", "detail": f"the tester failed: {type(error).__name__}: {error}"}
    finally:
        _tell(report, result)
        os._exit(0)


def _start_program(job: dict[str, Any], driver_source: str, output: int) -> tuple[int, int, int]:
    """Fork the program's process; its pid and the pipes to and from it.

    Raises:
        Refused: its limits cannot be set, or Python does not start.
    """
    request_read, request_write = os.pipe()
    reply_read, reply_write = os.pipe()
    failure_read, failure_write = os.pipe()  # closed by the kernel when Python starts
    pid = os.fork()
    if pid == 0:
        _become_program(job, driver_source, (output, request_read, reply_write, failure_write))
    for descriptor in (request_read, reply_write, failure_write, output):
        os.close(descriptor)
    if failure := os.read(failure_read, 1 << 12):
        raise setup.Refused(failure.decode())
    return pid, request_write, reply_read


def _become_program(job: dict[str, Any], driver_source: str, pipes: tuple[int, int, int, int]) -> NoReturn:
    """Limits and descriptors; then Python anew, with nothing of this process in memory."""
    high = 64  # above what is to be replaced
    output, requests, replies, failure = (os.dup2(pipe, high + i) for i, pipe in enumerate(pipes))
    try:
        os.set_inheritable(failure, False)  # noqa: FBT003 - takes no keyword
        os.set_inheritable(0, True)  # noqa: FBT003
        has_tests = job["tests"] is not None
        for source, target in ((output, 1), (output, 2), (requests, 3), (replies, 4)):
            os.dup2(source, target)
        os.closerange(5 if has_tests else 3, failure)
        os.closerange(failure + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir(setup.FOLDER)
        os.setsid()
        setup.limit(job["limits"])
        python = job["python"]
        words = ["-c", driver_source] if has_tests else [_write_program(job["program"])]
        os.execve(python, [python, "-I", "-S", "-X", "utf8", *words], ENVIRONMENT)
    except BaseException as error:  # noqa: BLE001 - told, and the process ends
        os.write(failure, f"start of the program: {error}".encode())
    finally:
        os._exit(126)


def _write_program(program: str) -> str:
    path = Path(setup.FOLDER) / "program.py"
    path.write_text(program, encoding="utf-8", errors="surrogatepass")
    return str(path)


def _exit_of(pid: int, detail: str) -> dict[str, Any]:
    """How the program's process ended, where it did."""
    for _ in range(50):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    else:
        return {"detail": f"{detail}; its process closed the pipe and lives"}
    code = os.waitstatus_to_exitcode(status)
    return {"detail": f"{detail}: {_how_it_ended(code)}", "exit_code": code}


def _how_it_ended(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
