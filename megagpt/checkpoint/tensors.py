"""Slices of logical tensors in safetensors files: what each rank writes, and how any layout reads what it needs.

A rank's file holds, for each of its slices, three 1-D fp32 tensors `NAME|weight`, `NAME|exp_avg`, `NAME|exp_avg_sq`,
and in the header's metadata `NAME -> {"shape", "start"}`: the logical tensor's shape and the slice's flat offset in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.checkpoint import fsio
from megagpt.errors import CheckpointError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A contiguous part of a flattened logical tensor."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    start: int
    """First element of the part in the flattened tensor."""
    values: Mapping[str, Tensor]
    """Kind -> the part's values, 1-D fp32."""


def write_slices(path: Path, slices: Iterable[TensorSlice]) -> tuple[int, str]:
    """Write one rank's safetensors file, tensor by tensor.

    Returns:
        (bytes, xxh3-128 in hex) of what was written, taken from memory.
    """
    parts = list(slices)
    header: dict[str, Any] = {"__metadata__": {}}
    offset = 0
    for part in parts:
        header["__metadata__"][part.name] = json.dumps({"shape": part.shape, "start": part.start})
        for kind in KINDS:
            end = offset + 4 * part.values[kind].numel()
            entry = {"dtype": "F32", "shape": [part.values[kind].numel()], "data_offsets": [offset, end]}
            header[f"{part.name}|{kind}"] = entry
            offset = end
    return fsio.write_file(path, _file_chunks(header, parts))


def _file_chunks(header: dict[str, Any], parts: Sequence[TensorSlice]) -> Iterator[bytes | memoryview]:
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for part in parts:
        for kind in KINDS:
            values = part.values[kind].detach().to("cpu", torch.float32).contiguous()
            yield values.numpy().view(np.uint8).data


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    numel: int
    file: Any


class SliceReader:
    """Logical tensors of one checkpoint, read slice by slice from all ranks' files.

    Use as a context manager. Memory is bounded by the largest slice asked for.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._stack = ExitStack()
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
            for name, described in (file.metadata() or {}).items():
                self._add(name, json.loads(described), file)

    def _add(self, name: str, described: dict[str, Any], file: Any) -> None:
        numel = file.get_slice(f"{name}|{WEIGHT}").get_shape()[0]
        self._shapes[name] = tuple(described["shape"])
        self._pieces.setdefault(name, []).append(_Piece(described["start"], numel, file))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every logical tensor."""
        return self._shapes

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """`numel` values of a flattened logical tensor from `start` on, 1-D fp32.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or not all of it.
        """
        if name not in self._pieces:
            raise CheckpointError(
                f"the checkpoint has no tensor '{name}'; it belongs to another model "
                f"(it has {len(self._shapes)} tensors, for example '{next(iter(self._shapes), '')}')"
            )
        result = torch.empty(numel)
        filled = 0
        for piece in self._pieces[name]:
            begin, end = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if begin < end:
                found = piece.file.get_slice(f"{name}|{kind}")[begin - piece.start : end - piece.start]
                result[begin - start : end - start] = found
                filled += end - begin
        if filled != numel:
            raise CheckpointError(
                f"tensor '{name}': {filled} of {numel} values from {start} on are in the checkpoint's files; "
                "a rank's file is missing or belongs to another save"
            )
        return result

    def read_whole(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A logical tensor in its own shape, fp32."""
        shape = self._shapes.get(name, ())
        return self.read(name, kind, 0, torch.Size(shape).numel()).view(shape)

    def check_model(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with a model's.

        Raises:
            CheckpointError: naming the first tensors that are missing, unknown, or of another shape.
        """
        missing = sorted(expected.keys() - self._shapes.keys())
        unknown = sorted(self._shapes.keys() - expected.keys())
        other = [
            f"{name} is {self._shapes[name]} in the checkpoint, {shape} in the model"
            for name, shape in expected.items()
            if name in self._shapes and self._shapes[name] != tuple(shape)
        ]
        problems = [f"missing {missing[:3]}"] * bool(missing) + [f"unknown {unknown[:3]}"] * bool(unknown)
        if problems or other:
            raise CheckpointError("checkpoint of another model: " + "; ".join(problems + other[:3]))
