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
from megagpt.checkpoint.spans import Spans
from megagpt.errors import CheckpointError
from megagpt.model.layout import Shard

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What is kept of a tensor under AdamW."""
MOMENTUM = "momentum"
"""What Muon keeps of a matrix, instead of moments."""

CHUNK_NUMEL = 2**22
"""Elements that are moved at a time between differently cut tensors: what bounds the memory of the index arithmetic."""


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


def write_slices(path: Path, slices: Iterable[TensorSlice]) -> tuple[int, str]:
    """Write one rank's safetensors file, tensor by tensor.

    Returns:
        (bytes, xxh3-128 in hex) of what was written, taken from memory.
    """
    parts = list(slices)
    header: dict[str, Any] = {"__metadata__": {}}
    offset = 0
    for part in parts:
        header["__metadata__"][part.name] = json.dumps(_description(part))
        for kind, values in part.values.items():
            end = offset + 4 * values.numel()
            entry = {"dtype": "F32", "shape": [values.numel()], "data_offsets": [offset, end]}
            header[f"{part.name}|{kind}"] = entry
            offset = end
    return fsio.write_file(path, _file_chunks(header, parts))


def _description(part: TensorSlice) -> dict[str, Any]:
    described: dict[str, Any] = {"shape": part.shape, "start": part.start}
    if part.shard is not None:
        described["shard"] = {"dim": part.shard.layout.dim, "spans": part.shard.spans}
    return described


def _file_chunks(header: dict[str, Any], parts: Sequence[TensorSlice]) -> Iterator[bytes | memoryview]:
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
    yield len(encoded).to_bytes(8, "little")
    yield encoded
    for part in parts:
        for held in part.values.values():
            values = held.detach().to("cpu", torch.float32).contiguous()
            yield values.numpy().view(np.uint8).data


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    numel: int
    file: Any
    spans: Spans
    kinds: tuple[str, ...]

    def values(self, name: str, kind: str, begin: int, end: int) -> Tensor:
        """Elements `begin` to `end`, counted as `start` is."""
        if kind not in self.kinds:
            raise CheckpointError(
                f"tensor '{name}' has no '{kind}' in the checkpoint (it has {', '.join(self.kinds)}): "
                "it was saved under another optimizer"
            )
        found: Tensor = self.file.get_slice(f"{name}|{kind}")[begin - self.start : end - self.start]
        return found


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
            kinds: dict[str, list[str]] = {}
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name, _, kind = key.rpartition("|")
                kinds.setdefault(name, []).append(kind)
            for name, described in (file.metadata() or {}).items():
                self._add(name, json.loads(described), file, kinds[name])

    def _add(self, name: str, described: dict[str, Any], file: Any, kinds: Iterable[str]) -> None:
        numel = file.get_slice(f"{name}|{WEIGHT}").get_shape()[0]
        self._shapes[name] = tuple(described["shape"])
        spans = Spans.from_description(self._shapes[name], described.get("shard"))
        in_order = tuple(sorted(kinds, key=lambda kind: (kind != WEIGHT, kind)))
        self._pieces.setdefault(name, []).append(_Piece(described["start"], numel, file, spans, in_order))

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
        result = torch.zeros(numel)
        stop = min(start + numel, wanted.numel)  # behind it is padding
        filled = sum(
            _copy(piece, (name, kind), result, start, stop, wanted) for piece in self._pieces[name] if start < stop
        )
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
            raise CheckpointError("checkpoint of another model: " + "; ".join(problems + other[:3]))


def _copy(piece: _Piece, key: tuple[str, str], result: Tensor, start: int, stop: int, wanted: Spans) -> int:
    """Copy what a piece has of the elements `start` to `stop` of `wanted` into `result`; how many they were."""
    if piece.spans == wanted:
        begin, end = max(start, piece.start), min(stop, piece.start + piece.numel)
        if begin < end:
            result[begin - start : end - start] = piece.values(*key, begin, end)
        return max(0, end - begin)
    low, high = wanted.logical_range(start, stop)
    copied = 0
    for begin in range(piece.start, piece.start + piece.numel, CHUNK_NUMEL):
        end = min(begin + CHUNK_NUMEL, piece.start + piece.numel)
        here_low, here_high = piece.spans.logical_range(begin, end)
        if here_high <= low or high <= here_low:
            continue
        place = wanted.to_local(piece.spans.to_logical(torch.arange(begin, end)))
        is_wanted = (place >= start) & (place < stop)
        result[place[is_wanted] - start] = piece.values(*key, begin, end)[is_wanted]
        copied += int(torch.count_nonzero(is_wanted))
    return copied
