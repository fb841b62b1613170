"""The header of a GGUF file, checked: it may come from anyone, and sizes of memory follow from it.

It is read here and not by the `gguf` package, which makes a NumPy array of every element of every list and trusts each
count that a file states. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.checkpoint import fsio
from megagpt.errors import CheckpointError

MAX_HEADER = 64_000_000
"""Bytes. A vocabulary of 256 thousand tokens with its merges takes 15 million."""
MAX_ENTRIES = 65_536
"""Keys, and likewise tensors. Llama 405B has 1,137 tensors."""
MAX_STRINGS = 2**21
"""In one list. The largest vocabularies have 2**19 merges."""
MAX_NAME = 1000
"""Bytes of a key's or a tensor's name."""
MAX_RANK = 4
"""Dimensions of a tensor. Source: the format's own limit."""
DEFAULT_ALIGNMENT = 32

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "<u1", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip
"""Type of a value in the metadata -> NumPy's."""
_SMALLEST_ENTRY, _SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Bytes: a key of no letters with one byte, and a tensor of no name with one dimension."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, as the header tells it; how many bytes it has there depends on its type."""

    shape: tuple[int, ...]
    """Rows first, as in PyTorch: the file has them the other way round."""
    ggml_type: int
    start: int
    """Byte of the file."""


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What stands before the tensors' data."""

    metadata: Mapping[str, Any]
    """Key -> int, float, bool or str; a list of strings; or an array of numbers."""
    tensors: Mapping[str, StoredTensor]
    file_size: int


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read everything but the tensors.

    Raises:
        CheckpointError: naming the file, and what in it is no GGUF or cannot be.
    """
    try:
        with fsio.open_regular(path.resolve()) as file:
            size = file.seek(0, 2)
            if size < len(_MAGIC):
                raise ValueError(f"a file of {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, size))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not a GGUF file that can be read: {error}") from None


class _Cursor:
    """Reads forward, and nothing that is not there."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data = data
        self.size = size
        self.at = 0

    def take(self, n_bytes: int, what: str) -> bytes:
        """The next bytes."""
        if n_bytes > self.size - self.at:
            raise ValueError(f"{what} has {n_bytes} bytes from byte {self.at} on, the file {self.size}; is it whole?")
        if n_bytes > MAX_HEADER - self.at:
            raise ValueError(f"{what} has {n_bytes} bytes from byte {self.at} on; a header has at most {MAX_HEADER}")
        self.at += n_bytes
        return self._data[self.at - n_bytes : self.at]

    def number(self, form: str, what: str) -> int:
        """One integer, in the letters of `struct`."""
        value: int = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return value

    def name(self, what: str) -> str:
        """A key's or a tensor's: short enough to be told."""
        (n_bytes,) = struct.unpack("<Q", self.take(8, what))
        if n_bytes > MAX_NAME:
            raise ValueError(f"{what} has {n_bytes} bytes; at most {MAX_NAME} can be")
        self.at -= 8
        return self.text(what)

    def text(self, what: str) -> str:
        """A string with its length before it."""
        raw = self.take(self.number("<Q", what), what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8: {error}") from None

    def count(self, n: int, smallest: int, what: str) -> int:
        """A number of things that are still to come, if so many can."""
        if n * smallest > self.size - self.at:
            raise ValueError(
                f"{what}: {n} of at least {smallest} bytes each from byte {self.at} on, "
                f"but the file has {self.size} bytes; is it whole?"
            )
        return n


def _parse(cursor: _Cursor) -> GGUFHeader:
    magic = cursor.take(4, "the magic")
    if magic != _MAGIC:
        raise ValueError(f"it begins with {magic!r}, not with {_MAGIC!r}")
    version = cursor.number("<I", "the version")
    if version not in _VERSIONS:
        swapped = " (a big-endian file)" if version.to_bytes(4, "big")[0] in _VERSIONS else ""
        raise ValueError(f"version {version}{swapped}; only {' and '.join(map(str, _VERSIONS))}, little-endian, can")
    n_tensors, n_entries = (cursor.number("<Q", what) for what in ("the number of tensors", "the number of keys"))
    for n, smallest, what in ((n_entries, _SMALLEST_ENTRY, "keys"), (n_tensors, _SMALLEST_TENSOR, "tensors")):
        if cursor.count(n, smallest, what) > MAX_ENTRIES:
            raise ValueError(f"{n} {what}; at most {MAX_ENTRIES} are read")
    metadata: dict[str, Any] = {}
    for _ in range(n_entries):
        key = cursor.name("a key's name")
        if key in metadata:
            raise ValueError(f"key {key} stands twice")
        metadata[key] = _value(cursor, cursor.number("<I", key), key)
    found = [_tensor(cursor) for _ in range(n_tensors)]
    return GGUFHeader(metadata, _placed(found, cursor, _alignment(metadata)), cursor.size)


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.text(key)
    if kind == _ARRAY:
        return _array(cursor, key)
    (value,) = _numbers(cursor, kind, 1, key).tolist()
    return value


def _array(cursor: _Cursor, key: str) -> Any:
    kind, n = cursor.number("<I", key), cursor.number("<Q", key)
    if kind == _STRING:
        if cursor.count(n, 8, f"{key}: elements") > MAX_STRINGS:
            raise ValueError(f"{key} has {n} strings; at most {MAX_STRINGS} are read")
        return [cursor.text(key) for _ in range(n)]
    return _numbers(cursor, kind, n, key)


def _numbers(cursor: _Cursor, kind: int, n: int, key: str) -> np.ndarray[Any, Any]:
    if kind not in _NUMBERS:
        raise ValueError(f"{key} is of type {kind}; known are numbers (0-7, 10-12), strings (8) and lists of them (9)")
    form = np.dtype(_NUMBERS[kind])
    raw = cursor.take(cursor.count(n, form.itemsize, f"{key}: elements") * form.itemsize, key)
    values = np.frombuffer(raw, form)
    if kind != _BOOL:
        return values
    if np.any(values > 1):
        raise ValueError(f"{key}: a truth value of {int(values.max())}; 0 and 1 are")
    return values.astype(bool)


def _tensor(cursor: _Cursor) -> tuple[str, StoredTensor]:
    name = cursor.name("a tensor's name")
    rank = cursor.number("<I", name)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"tensor {name} has {rank} dimensions; 1 to {MAX_RANK} can be")
    sizes = [cursor.number("<Q", name) for _ in range(rank)]
    if not 0 < math.prod(sizes) < 2**62:
        raise ValueError(f"tensor {name} has the sizes {sizes}")
    ggml_type, offset = cursor.number("<I", name), cursor.number("<Q", name)
    return name, StoredTensor(tuple(reversed(sizes)), ggml_type, offset)


def _alignment(metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise ValueError(f"general.alignment = {value!r}; a power of two is")
    return value


def _placed(found: list[tuple[str, StoredTensor]], cursor: _Cursor, alignment: int) -> dict[str, StoredTensor]:
    """Offsets counted from the start of the file."""
    data_start = -(-cursor.at // alignment) * alignment
    placed: dict[str, StoredTensor] = {}
    for name, tensor in found:
        if name in placed:
            raise ValueError(f"tensor {name} stands twice")
        start = data_start + tensor.start
        if tensor.start % alignment or start >= cursor.size:
            raise ValueError(
                f"tensor {name} is said to begin {tensor.start} bytes behind byte {data_start}, "
                f"in a file of {cursor.size} bytes aligned to {alignment}"
            )
        placed[name] = StoredTensor(tensor.shape, tensor.ggml_type, start)
    return placed
