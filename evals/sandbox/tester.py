"""A problem's tests, run beside the untrusted program and never in its process. Standard library only.

The program cannot declare itself right: the tests, with the answers that they expect, are in this process alone, and
the comparison is made here, between values that were rebuilt from plain data. The program's process only ever sees the
arguments. What it prints, how it ends and what it writes to the pipe decide nothing else.
"""

from __future__ import annotations

import builtins
import json
import os
from typing import Any

from evals.sandbox.driver import decode, describe_error, encode

MAX_REPLY_BYTES = 32 << 20


class ProgramEnded(BaseException):
    """The program's process is gone, or writes what is no answer; `except Exception` in a test does not catch it."""


class Channel:
    """Calls of the program's function through two pipes."""

    def __init__(self, requests: int, replies: int) -> None:
        """Descriptors: to the program and from it."""
        self._requests = requests
        self._replies = os.fdopen(replies, "rb")
        self.ended: str | None = None
        """Why no more answers come."""

    def load(self, program: str, entry_point: str) -> None:
        """Have the program run from top to bottom.

        Raises:
            ProgramEnded: no answer.
            Exception: what the program raised.
        """
        self._send({"program": program, "entry_point": entry_point})
        self._receive()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The function's value for these arguments; raises likewise."""
        self._send({"args": encode(list(args)), "kwargs": encode(kwargs)})
        return decode(self._receive().get("value"))

    def _send(self, content: dict[str, Any]) -> None:
        rest = memoryview(json.dumps(content).encode() + b"\n")
        try:
            while rest:
                rest = rest[os.write(self._requests, rest) :]
        except BrokenPipeError:
            self._end("the program ended before its tests did")

    def _receive(self) -> dict[str, Any]:
        line = self._replies.readline(MAX_REPLY_BYTES)
        if not line.endswith(b"\n"):
            self._end(
                f"an answer of more than {MAX_REPLY_BYTES} bytes"
                if len(line) == MAX_REPLY_BYTES
                else "the program ended before its tests did"
            )
        try:
            content = json.loads(line)
            error = content.get("error")
            if error is None:
                return dict(content)
            name, message = str(error[0]), str(error[1])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            self._end("the program wrote something else than an answer")
        raise _same_exception(name, message)

    def _end(self, why: str) -> None:
        self.ended = why
        raise ProgramEnded(why)


def _same_exception(name: str, message: str) -> Exception:
    """The built-in exception of that name; a test may expect it."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError and its like want more
            pass
    return RuntimeError(f"{name}: {message}")


def run_tests(channel: Channel, job: dict[str, Any]) -> dict[str, str]:
    """Status and detail: passed, failed, out_of_memory or ended.

    Args:
        channel: to the program's process.
        job: program, setup, tests, entry_point.
    """
    namespace: dict[str, Any] = {"__name__": "tests"}
    try:
        channel.load(job["program"], job["entry_point"])
        exec(compile(job["setup"], "<setup>", "exec"), namespace)
        namespace[job["entry_point"]] = channel.call
        exec(compile(job["tests"], "<tests>", "exec"), namespace)
    except BaseException as error:  # noqa: BLE001 - whatever the tests do is to be told
        if channel.ended is None:
            kind, message = describe_error(error)
            status = "out_of_memory" if kind == "MemoryError" else "failed"
            return {"status": status, "detail": f"{kind}: {message}" if message else kind}
    if channel.ended is not None:
        return {"status": "ended", "detail": channel.ended}
    return {"status": "passed", "detail": ""}
