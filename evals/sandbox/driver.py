"""What the untrusted program's process runs first: it loads the program and answers calls of its function.

The tester sends arguments and gets values back; it never trusts what comes. This file is given to `python -c` inside
the sandbox and so stands alone; the tester uses the same encoding.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from decimal import Decimal
from fractions import Fraction
from typing import Any

REQUESTS, REPLIES = 3, 4
"""Descriptors of the two pipes."""


class Opaque:
    """A value of a type that is not carried over; it equals nothing else."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name

    def __repr__(self) -> str:
        return f"<an object of type {self.type_name}>"


_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


_TAGGED: list[tuple[Any, Any]] = [
    (dict, lambda value: ["dict", [[encode(key), encode(item)] for key, item in value.items()]]),
    (bytes | bytearray, lambda value: ["bytes", bytes(value).hex()]),
    (complex, lambda value: ["complex", [value.real, value.imag]]),
    (Decimal | Fraction, lambda value: [type(value).__name__, str(value)]),
    (
        Iterator | range | KeysView | ValuesView | ItemsView,
        lambda value: ["iterator", [encode(item) for item in value]],
    ),
]


def encode(value: Any) -> Any:
    """Plain values as JSON that keeps their types; of subclasses (OrderedDict, Counter, enums) the plain base."""
    if value is None or isinstance(value, bool):
        return value
    for base in (int, float, str):
        if isinstance(value, base):
            return base(value)
    for name, sequence in _SEQUENCES.items():
        if isinstance(value, sequence):
            return [name, [encode(item) for item in value]]
    for kinds, write in _TAGGED:
        if isinstance(value, kinds):
            return write(value)
    return ["opaque", type(value).__name__]


_DECODERS: dict[str, Any] = {
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "Decimal": lambda text: Decimal(str(text)),
    "Fraction": lambda text: Fraction(str(text)),
    "iterator": lambda items: iter([decode(item) for item in items]),
    "opaque": lambda name: Opaque(str(name)[:100]),
}


def decode(content: Any) -> Any:
    """What `encode` wrote.

    Raises:
        ValueError: nothing that `encode` writes, as are KeyError and TypeError.
    """
    if not isinstance(content, list):
        if isinstance(content, dict):
            raise ValueError("a bare JSON object")
        return content
    kind, inner = content
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decode(item) for item in inner)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in inner}
    return _DECODERS[kind](inner)


def describe_error(error: BaseException) -> list[str]:
    """Type and message, short."""
    try:
        text = str(error)
    except BaseException as second:  # noqa: BLE001 - the program's own exception, which may do anything
        text = f"<{type(second).__name__} while its message was made>"
    return [type(error).__name__, text[:1000]]


def main() -> None:
    """Serve until the tester closes the pipe or ends the process."""
    sys.set_int_max_str_digits(0)
    requests = os.fdopen(REQUESTS, "rb")

    def reply(content: Any) -> None:
        rest = memoryview(json.dumps(content).encode() + b"\n")
        while rest:
            rest = rest[os.write(REPLIES, rest) :]

    job = json.loads(requests.readline())
    namespace: dict[str, Any] = {"__name__": "solution"}
    try:
        exec(compile(job["program"], "<program>", "exec"), namespace)
    except BaseException as error:  # noqa: BLE001 - whatever the program does is to be told
        reply({"error": describe_error(error)})
        return
    reply({"loaded": True})
    for line in requests:
        request = json.loads(line)
        try:
            if job["entry_point"] not in namespace:
                raise NameError(f"the program defines no {job['entry_point']}")
            value = namespace[job["entry_point"]](*decode(request["args"]), **decode(request["kwargs"]))
            content = {"value": encode(value)}
        except BaseException as error:  # noqa: BLE001 - as above
            content = {"error": describe_error(error)}
        reply(content)


if __name__ == "__main__":
    main()
