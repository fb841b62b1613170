"""Slices of logical tensors in safetensors files: what each rank writes, and how any layout reads what it needs.

A rank's file holds, for each of its slices, 1-D fp32 tensors of the same length: `NAME|weight`, and what the optimizer
keeps of it: `NAME|exp_avg` and `NAME|exp_avg_sq` (AdamW), or `NAME|momentum` (Muon's matrices). The header's metadata
has `NAME -> {"shape", "start"}`: the logical tensor's shape and the slice's flat offset in it.
Where tensor parallelism cuts the tensor, `"shard"` names what this rank holds, and the offset counts in that:
`{"dim", "spans"}`, the dimension that is cut and [start, size] of each stretch along it, in the order they are held.
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
from megagpt.checkpoint.headers import Described, check_disjoint, read_header
from megagpt.checkpoint.spans import Spans, stretches
from megagpt.errors import CheckpointError
from megagpt.model.layout import Extent, Shard

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What is kept of a tensor under AdamW."""
MOMENTUM = "momentum"
"""What Muon keeps of a matrix, instead of moments."""


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A contiguous part of a flattened logical tensor, or of a shard of it."""

    name: str
    shape: tuple[int, ...]
    """Shape of the whole logical tensor."""
    start: int
    """First element of the part in the flattened tensor, or in the flattened shard."""
    values: Mapping[str, Tensor]
    """Kind -> the part's values, 1-D fp32."""
    shard: Shard | None = None
    """What the rank holds of a tensor that is cut over a tensor group."""


@dataclass(frozen=True, slots=True)
class RankFile:
    """What one rank's safetensors file will hold."""

    header: bytes
    values: Sequence[Tensor]
    """1-D, in the file's order, on any device; written as fp32."""

    @classmethod
    def of(cls, slices: Iterable[TensorSlice]) -> Self:
        """The file of these slices, whose values are read when it is written."""
        parts = list(slices)
        return cls(slices_header(parts), [values for part in parts for values in part.values.values()])

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + 4 * sum(values.numel() for values in self.values)

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The file's content, a tensor at a time."""
        return _file_chunks(self.header, self.values)


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def write_slices(path: Path, slices: Iterable[TensorSlice]) -> tuple[int, str]:
    """Write one rank's safetensors file, tensor by tensor.

    Returns:
        (bytes, xxh3-128 in hex) of what was written, taken from memory.
    """
    return fsio.write_file(path, RankFile.of(slices).chunks())


def write_extents(
    path: Path, extents: Iterable[tuple[Extent, Sequence[str]]], values: Iterable[Tensor]
) -> tuple[int, str]:
    """As `write_slices`, of values that are made one at a time: only one of them need be in memory.

    Args:
        path: of the new file.
        extents: each slice, and the kinds of values that are written of it.
        values: of each slice and kind, in that order, 1-D.
    """
    return fsio.write_file(path, _file_chunks(_header(extents), values))


def slices_header(parts: Iterable[TensorSlice]) -> bytes:
    """The safetensors header of slices whose values follow in their order. The values' sizes alone count."""
    return _header(
        (Extent(part.name, part.shape, part.start, part.values[WEIGHT].numel(), part.shard), tuple(part.values))
        for part in parts
    )


def _header(extents: Iterable[tuple[Extent, Sequence[str]]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {}}
    offset = 0
    for extent, kinds in extents:
        header["__metadata__"][extent.name] = json.dumps(_description(extent))
        for kind in kinds:
            end = offset + 4 * extent.numel
            header[f"{extent.name}|{kind}"] = {
                "dtype": "F32",
                "shape": [extent.numel],
                "data_offsets": [offset, end],
            }
            offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    return len(encoded).to_bytes(8, "little") + encoded


def _description(extent: Extent) -> dict[str, Any]:
    described: dict[str, Any] = {"shape": extent.shape, "start": extent.start}
    if extent.shard is not None:
        described["shard"] = {"dim": extent.shard.layout.dim, "spans": extent.shard.spans}
    return described


def _file_chunks(header: bytes, values: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for held in values:
        whole = held.detach().to("cpu", torch.float32).contiguous()
        yield whole.numpy().view(np.uint8).data


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    numel: int
    file: Any
    spans: Spans
    kinds: tuple[str, ...]

    def values(self, name: str, kind: str) -> Tensor:
        """All of it, 1-D: a view of the file, of which is read what is looked at."""
        if kind not in self.kinds:
            raise CheckpointError(
                f"tensor '{name}' has no '{kind}' in the checkpoint (it has {', '.join(self.kinds)}): "
                "it was saved under another optimizer"
            )
        found: Tensor = self.file.get_tensor(f"{name}|{kind}")
        return found


class SliceReader:
    """Logical tensors of one checkpoint, read slice by slice from all ranks' files.

    Use as a context manager. Files are mapped into memory, and of them only the stretches that hold what is asked for
    are read: memory is bounded by the largest slice asked for.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._where = files[0].parent if files else "a checkpoint without tensors"
        self.bytes_read = 0
        """Bytes of values that were copied out of the files so far."""
        self._stack = ExitStack()
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        described: dict[str, list[tuple[Path, Described]]] = {}
        for path in files:
            header = read_header(path)
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from None
            for name, one in header.items():
                described.setdefault(name, []).append((path, one))
                self._shapes[name] = one.shape
                self._pieces.setdefault(name, []).append(_Piece(one.start, one.numel, file, one.spans, one.kinds))
        for name, slices in described.items():
            check_disjoint(name, slices)

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

    def kinds(self, name: str) -> tuple[str, ...]:
        """What is kept of a tensor: `WEIGHT`, then `MOMENTS` or `MOMENTUM`."""
        return self._pieces[name][0].kinds

    def read(self, name: str, kind: str, start: int, numel: int, shard: Shard | None = None) -> Tensor:
        """`numel` values of a flattened logical tensor from `start` on, 1-D fp32.

        Args:
            name: the tensor's.
            kind: one of `KINDS`, or `MOMENTUM`.
            start: counts in the flattened tensor; in the flattened shard where one is given.
            numel: how many.
            shard: what the reader holds of the tensor; padding reads as 0.

        Raises:
            CheckpointError: the checkpoint has no such tensor, or not all of it.
        """
        if name not in self._pieces:
            raise CheckpointError(
                f"the checkpoint has no tensor '{name}'; it belongs to another model "
                f"(it has {len(self._shapes)} tensors, for example '{next(iter(self._shapes), '')}')"
            )
        wanted = Spans.of(self._shapes[name], shard)
        if shard is not None and not all(piece.spans.is_comparable(wanted) for piece in self._pieces[name]):
            # Written by a version of the layer that was cut along another dimension: by way of the whole tensor.
            return shard.cut(self.read_whole(name, kind)).flatten()[start : start + numel]
        result = torch.zeros(numel)
        stop = min(start + numel, wanted.numel)  # behind it is padding
        filled = 0
        for piece in self._pieces[name] if start < stop else ():
            held = range(piece.start, piece.start + piece.numel)
            for run in stretches(piece.spans, held, wanted, range(start, stop)):
                values = piece.values(name, kind)
                run.wanted.of(result, start).copy_(run.held.of(values, piece.start))
                filled += run.wanted.numel
        self.bytes_read += 4 * filled
        if filled != max(0, stop - start):
            raise CheckpointError(
                f"tensor '{name}': {filled} of {stop - start} values from {start} on are in the checkpoint's files; "
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
            raise CheckpointError(f"{self._where}: checkpoint of another model: {'; '.join(problems + other[:3])}")
