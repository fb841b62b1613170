"""Texts of two classes, read and turned into features once; the features lie in a file."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.classify.features import FeatureSettings, text_features
from data_pipeline.config import Source
from data_pipeline.document import Damage, Shard
from data_pipeline.sources.files import find_files
from data_pipeline.sources.shards import list_shards, read_shard
from megagpt.errors import DataError

LEAST_FEATURES = 5
"""Texts with fewer (no words, or two) teach nothing; they are counted and passed over."""

_DOCUMENTS_FILE = "docs.parquet"
_IMBALANCE = 10
_FEW_HELD_OUT = 50


@dataclass(slots=True)
class Examples:
    """The texts that were read, without their features: 13 bytes each."""

    labels: array[int] = field(default_factory=lambda: array("B"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    """xxh3_64 of each text."""
    sizes: array[int] = field(default_factory=lambda: array("I"))
    """Features of each text."""
    short: int = 0
    damaged: int = 0

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.int64]]:
        """Labels and hashes, (n,) each, and where the features of each text begin and end, (n + 1,)."""
        sizes = np.array(self.sizes, np.int64)
        return np.array(self.labels, np.uint8), np.array(self.hashes, np.uint64), np.append(0, np.cumsum(sizes))


def read_examples(
    by_class: tuple[tuple[str, ...], tuple[str, ...]],
    text_key: str,
    settings: FeatureSettings,
    spool: BinaryIO,
    console: Console,
) -> Examples:
    """Read the texts of the negative (0) and the positive (1) class, and write their features one after the other.

    Args:
        by_class: files, folders or globs of each.
        text_key: field that holds the text (jsonl, parquet).
        settings: of the features.
        spool: where the features go, uint32.
        console: for the progress bar.

    Raises:
        DataError: no such files, or pages instead of texts.
    """
    examples = Examples()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for label, paths in enumerate(by_class):
            shards = [shard for path in paths for shard in _shards(path, text_key)]
            size = sum(shard.size_bytes for _, shard in shards)
            bar = progress.add_task(("negative texts", "positive texts")[label], total=size or None)
            for source, shard in shards:
                for text in _texts(source, shard, examples):
                    _add(text, label, settings, examples, spool)
                progress.advance(bar, shard.size_bytes)
    return examples


def warnings_of(examples: Examples, held_out: NDArray[np.bool_]) -> list[str]:
    """What a user should know of the texts before trusting the figures."""
    labels, hashes, _ = examples.arrays()
    negative, positive = hashes[labels == 0], hashes[labels == 1]
    found = []
    if examples.damaged:
        found.append(f"{examples.damaged} records could not be read")
    if examples.short:
        found.append(f"{examples.short} texts without words, or with one or two, were left out")
    if not 1 / _IMBALANCE <= len(positive) / len(negative) <= _IMBALANCE:
        found.append(
            f"{len(positive)} positive and {len(negative)} negative texts: the smaller class is weighed up, "
            "but what it says rests on few texts"
        )
    for name, one in (("positive", positive), ("negative", negative)):
        if repeats := len(one) - len(np.unique(one)):
            found.append(f"{repeats} {name} texts occur more than once; deduplicate them first")
    if both := len(np.intersect1d(positive, negative)):
        found.append(f"{both} texts are in both classes and teach nothing")
    few = min(int((held_out & (labels == 1)).sum()), int((held_out & (labels == 0)).sum()))
    if few < _FEW_HELD_OUT:
        found.append(f"only {few} held-out texts in the smaller class: the figures are rough")
    return found


def _shards(path: str, text_key: str) -> list[tuple[Source, Shard]]:
    """A data job's folder stands for its docs.parquet files; anything else is a source as of a job."""
    inside = [file for file, _ in find_files(path) if Path(file).name == _DOCUMENTS_FILE] if Path(path).is_dir() else []
    sources = [Source(path=one, text_key=text_key) for one in inside or [path]]
    return [(source, shard) for source in sources for shard in list_shards(source, 0)]


def _texts(source: Source, shard: Shard, examples: Examples) -> Iterator[str]:
    for record in read_shard(shard, source):
        if isinstance(record, Damage):
            examples.damaged += 1
        elif record.text is not None:
            yield record.text
        elif not record.reject:
            raise DataError(f"{shard.path}: {shard.kind} holds pages, not texts; give the docs.parquet of a data job")


def _add(text: str, label: int, settings: FeatureSettings, examples: Examples, spool: BinaryIO) -> None:
    features = text_features(text, settings)
    if len(features) < LEAST_FEATURES:
        examples.short += 1
        return
    spool.write(features.tobytes())
    examples.labels.append(label)
    examples.hashes.append(xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")))
    examples.sizes.append(len(features))
