"""What packing will write, counted before anything is written: which pairs there are, and what goes into each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.config import PackSection
from data_pipeline.encode import ENCODED_FILE
from data_pipeline.parquet_reader import open_rows
from data_pipeline.shuffle import SPLITS, split_of
from megagpt.errors import DataError

MOST_SOURCES = 250
"""Pairs that per-source packing keeps open at the same time, two files each: below a process's usual 1,024."""

_COUNTED = ("documents", "tokens", "text_bytes")
_BATCH_ROWS = 1 << 16
_UNSAFE = re.compile(r"[^\w.-]+")

Counted = dict[str, Any]
"""documents, tokens, text_bytes, and the same by source under `sources`."""


@dataclass(frozen=True)
class PackPlan:
    """The pairs to write, in order, and what goes into each."""

    splits: dict[str, Counted]
    """Split -> counts."""
    files: dict[str, Counted]
    """Prefix -> split and counts."""
    n_documents: int
    n_tokens: int
    text_bytes: int
    _file_numbers: dict[str, NDArray[np.int32]]
    """Source -> number of the file that each split of it goes to."""

    def file_of(self, batch: pa.RecordBatch, settings: PackSection) -> NDArray[np.int32]:
        """Number of the pair that each document goes to, (n,)."""
        names, codes = _sources(batch)
        by_source = np.stack([self._file_numbers[name] for name in names])
        return np.asarray(by_source[codes, _splits(batch, settings)], np.int32)


def plan_files(shards: Sequence[Path], settings: PackSection) -> PackPlan:
    """Count documents, tokens and bytes of each split and source, and lay out the pairs.

    Args:
        shards: folders of encoded shards.
        settings: of packing.

    Raises:
        DataError: a split would be empty, or the sources cannot have pairs of their own.
    """
    counts = _count(shards, settings)
    names = [split for split in SPLITS if split != "test" or settings.test_fraction > 0]
    splits = {name: _described({source: counts[source][SPLITS.index(name)] for source in counts}) for name in names}
    _check_splits(splits, settings)
    files: dict[str, Counted] = {}
    file_numbers = {source: np.zeros(len(SPLITS), np.int32) for source in counts}
    for split in names:
        for prefix, sources in _pairs(split, splits[split], settings).items():
            for source in sources:
                file_numbers[source][SPLITS.index(split)] = len(files)
            chosen = {source: counts[source][SPLITS.index(split)] for source in sources}
            files[prefix] = {"split": split, **_described(chosen)}
    n_documents, n_tokens, text_bytes = (sum(split[key] for split in splits.values()) for key in _COUNTED)
    return PackPlan(splits, files, n_documents, n_tokens, text_bytes, file_numbers)


def slug(source: str) -> str:
    """The name of a source as a part of a file's name: letters, digits, `.`, `-` and `_`.

    Raises:
        DataError: nothing is left of it.
    """
    found = _UNSAFE.sub("_", source).strip("_.")
    if not found:
        raise DataError(f"source {source!r}: no part of this name can be in a file's name; set another `name` for it")
    return found


def _pairs(split: str, counted: Counted, settings: PackSection) -> dict[str, list[str]]:
    """Prefix -> sources of the pairs of one split."""
    if split != "train" or not settings.per_source:
        return {f"{settings.name}_{split}": list(counted["sources"])}
    pairs: dict[str, list[str]] = {}
    for source, values in counted["sources"].items():
        prefix = f"{settings.name}_{slug(source)}_{split}"
        if prefix in pairs:
            raise DataError(
                f"pack.per_source: the sources {pairs[prefix][0]!r} and {source!r} would both be written to {prefix}; "
                "set another `name` for one of them, or pack.per_source=false"
            )
        pairs[prefix] = [source] if values["documents"] else []
    if len(pairs) > MOST_SOURCES:
        raise DataError(
            f"pack.per_source: {len(pairs)} sources, but at most {MOST_SOURCES} can have token files of their own; "
            "a `name_from` with fewer values, or pack.per_source=false, packs them"
        )
    return {prefix: sources for prefix, sources in pairs.items() if sources}


def _count(shards: Sequence[Path], settings: PackSection) -> dict[str, NDArray[np.int64]]:
    """Source, in order of names -> (split, what is counted)."""
    counts: dict[str, NDArray[np.int64]] = {}
    for shard in shards:
        with open_rows(shard / ENCODED_FILE) as table:
            for batch in table.iter_batches(_BATCH_ROWS):
                names, codes = _sources(batch)
                place = codes * len(SPLITS) + _splits(batch, settings)
                amounts = np.ones((len(batch), len(_COUNTED)), np.int64)
                amounts[:, 1] = batch.column("n_tokens").to_numpy()
                amounts[:, 2] = batch.column("text_bytes").to_numpy()
                found = np.zeros((len(names) * len(SPLITS), len(_COUNTED)), np.int64)
                np.add.at(found, place, amounts)
                for name, part in zip(names, found.reshape(len(names), len(SPLITS), -1), strict=True):
                    counts[name] = counts.get(name, np.zeros_like(part)) + part
    return dict(sorted(counts.items()))


def _sources(batch: pa.RecordBatch) -> tuple[list[str], NDArray[np.int64]]:
    encoded = batch.column("source").dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def _splits(batch: pa.RecordBatch, settings: PackSection) -> NDArray[np.int8]:
    high, low = (batch.column(name).to_numpy() for name in ("hash_high", "hash_low"))
    return split_of(high, low, settings.seed, settings.val_fraction, settings.test_fraction)


def _described(by_source: Mapping[str, NDArray[np.int64]]) -> Counted:
    sources = {source: dict(zip(_COUNTED, values.tolist(), strict=True)) for source, values in by_source.items()}
    return {**{key: sum(values[key] for values in sources.values()) for key in _COUNTED}, "sources": sources}


def _check_splits(splits: Mapping[str, Counted], settings: PackSection) -> None:
    n = sum(split["documents"] for split in splits.values())
    if n == 0:
        raise DataError(
            "no document is left after filters and deduplication, so there is nothing to pack; "
            "`megagpt data status` shows which rule rejected them"
        )
    for name, key, long_name, fix in (
        ("val", "val_fraction", "validation", "raise"),
        ("test", "test_fraction", "test", "raise"),
        ("train", "val_fraction", "training", "lower"),
    ):
        if name in splits and not splits[name]["documents"]:
            raise DataError(
                f"pack.{key} = {getattr(settings, key)} of {n} documents leaves the {long_name} split empty; {fix} "
                f"pack.{key}, choose another pack.seed or add documents"
            )
