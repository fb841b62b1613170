"""The header of a rank's safetensors file, checked: it may come from anyone, and sizes of memory follow from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from megagpt.checkpoint import fsio
from megagpt.checkpoint.spans import Spans
from megagpt.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Bytes. Source: the safetensors format's own limit."""
_MAX_NUMEL = 2**62


@dataclass(frozen=True, slots=True)
class Described:
    """One slice, as a header tells it."""

    shape: tuple[int, ...]
    """Of the whole logical tensor."""
    start: int
    """First element, counted in what `spans` holds."""
    numel: int
    spans: Spans
    kinds: tuple[str, ...]
    """Of its values: `weight` first."""


def read_header(path: Path) -> dict[str, Described]:
    """Name -> slice, of every slice in a file.

    Raises:
        CheckpointError: naming the file, if it is no safetensors file of slices.
    """
    try:
        content, n_data = _read(path)
        return _slices(content, n_data)
    except OSError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        told = repr(error)
        raise CheckpointError(f"{path}: not a readable safetensors file of slices: {told[:300]}") from None


def check_disjoint(name: str, slices: Iterable[tuple[Path, Described]]) -> None:
    """Slices of one tensor, from all files, describe the same tensor and do not overlap: then none hides a hole.

    Raises:
        CheckpointError: naming the tensor and a file.
    """
    held = list(slices)
    path, first = held[0]
    stretches: set[tuple[int, int]] = set()
    by_spans: dict[Spans, list[tuple[int, int]]] = {}
    for path, one in held:
        if one.shape != first.shape or one.spans.size != first.spans.size or one.spans.outer != first.spans.outer:
            raise CheckpointError(f"{path}: tensor '{name}' is described in another way than in {held[0][0].name}")
        by_spans.setdefault(one.spans, []).append((one.start, one.start + one.numel))
        stretches |= {(start, start + size) for start, size in one.spans.spans}
    n_stretches = sum(len(spans.spans) for spans in by_spans)
    intervals = [sorted(stretches), *(sorted(found) for found in by_spans.values())]
    overlap = any(before[1] > after[0] for sorted_ones in intervals for before, after in pairwise(sorted_ones))
    if overlap or n_stretches != len(stretches):
        raise CheckpointError(f"{path}: tensor '{name}': values that are in another rank's file too")


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """The header's JSON, and the bytes of data behind it."""
    with fsio.open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        n_header = int.from_bytes(file.read(8), "little")
        if size < 8 or n_header > min(MAX_HEADER, size - 8):
            raise ValueError(f"a header of {n_header} bytes in a file of {size}")
        content = json.loads(file.read(n_header), object_pairs_hook=_once)
    return content, size - 8 - n_header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _slices(content: Mapping[str, Any], n_data: int) -> dict[str, Described]:
    kinds: dict[str, dict[str, int]] = {}
    end = 0
    for key, entry in sorted(_tensors(content), key=lambda item: item[1]["data_offsets"]):
        (numel,) = entry["shape"]
        begin = end
        end = begin + 4 * _natural(numel)
        if entry["dtype"] != "F32" or entry["data_offsets"] != [begin, end]:
            raise ValueError(f"{key!r}: {entry}")
        name, _, kind = key.rpartition("|")
        kinds.setdefault(name, {})[kind] = numel
    if end != n_data:
        raise ValueError(f"{n_data} bytes of data, {end} described")
    described = content.get("__metadata__", {})
    if described.keys() != kinds.keys():
        raise ValueError(f"described and held differ: {sorted(described.keys() ^ kinds.keys())[:3]}")
    return {name: _described(name, json.loads(text, object_pairs_hook=_once), kinds[name])
            for name, text in described.items()}  # fmt: skip


def _tensors(content: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return ((key, entry) for key, entry in content.items() if key != "__metadata__")


def _described(name: str, told: Mapping[str, Any], numels: Mapping[str, int]) -> Described:
    shape = tuple(_natural(size) for size in told["shape"])
    numel, start = numels["weight"], _natural(told["start"])
    if set(numels.values()) != {numel}:
        raise ValueError(f"{name!r}: {dict(numels)} values")
    if math.prod(shape) > _MAX_NUMEL:
        raise ValueError(f"{name!r}: shape {shape}")
    _check_shard(name, shape, told.get("shard"))
    spans = Spans.from_description(shape, told.get("shard"))
    if start + numel > spans.numel:
        raise ValueError(f"{name!r}: {numel} values from {start} on, of {spans.numel}")
    in_order = tuple(sorted(numels, key=lambda kind: (kind != "weight", kind)))
    return Described(shape, start, numel, spans, in_order)


def _check_shard(name: str, shape: tuple[int, ...], shard: Mapping[str, Any] | None) -> None:
    if shard is None:
        return
    before = 0
    for start, size in sorted(shard["spans"]):
        if _natural(start) < before or not _natural(size):
            raise ValueError(f"{name!r}: shard {shard}")
        before = start + size
    if not shard["spans"] or before > shape[_natural(shard["dim"])]:
        raise ValueError(f"{name!r}: shard {shard} of shape {shape}")


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_NUMEL:
        raise ValueError(f"{value!r} where a whole number belongs")
    return value
