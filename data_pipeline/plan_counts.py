"""How many documents a job will read, before it has read them: from Parquet's metadata, else from the first megabytes.

For `megagpt data run --dry-run`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.document import Damage
from data_pipeline.job_sources import PlannedShard
from data_pipeline.sources.files import open_file
from data_pipeline.sources.shards import read_shard

SAMPLE_SHARDS = 20
"""Read at most so many shards, spread evenly over the sources."""
SAMPLE_BYTES = 4 << 20
"""Read so much of each, as it lies on disk."""
SAMPLE_RECORDS = 20_000
EXACT_SHARDS = 500
"""Of more Parquet files than this, not even the footers are all read."""
TOKENS_PER_BYTE = 0.2291
"""GPT-2's tokens to a UTF-8 byte of web text. Source: Gao et al. 2020 (The Pile), tokens per byte of Pile-CC."""


@dataclass(frozen=True)
class SourceCounts:
    """What the shards of one source and format hold."""

    source: str
    kind: str
    n_shards: int
    n_sampled: int
    """Shards that were looked into."""
    documents: int | None
    """Pages, lines or rows that may become documents; None where that cannot be told without reading everything."""
    text_bytes: int | None
    """UTF-8; None for pages, whose text is not extracted yet."""
    exact: bool
    """`documents` was counted and not estimated."""


@dataclass
class _Sample:
    n_shards: int = 0
    n_bytes: int = 0
    """Of the files, as they lie on disk."""
    documents: int = 0
    texts: int = 0
    text_bytes: int = 0
    whole: bool = True
    """All of every shard was read."""


def count_documents(shards: Sequence[PlannedShard]) -> list[SourceCounts]:
    """Count or estimate, source by source; nothing is written.

    Raises:
        DataError: a shard cannot be opened, or lacks its text column.
    """
    groups: dict[tuple[str, str], list[PlannedShard]] = {}
    for planned in shards:
        groups.setdefault((planned.shard.source, planned.shard.kind), []).append(planned)
    n_each = max(1, SAMPLE_SHARDS // max(1, len(groups)))
    return [_count_group(group, n_each) for group in groups.values()]


def describe(counts: Sequence[SourceCounts]) -> list[str]:
    """One line a source."""
    return [f"  {one.source}: {_in_words(one)}" for one in counts]


def _in_words(one: SourceCounts) -> str:
    if one.documents is None:
        return "an unknown number of documents"
    if one.exact:
        parts = [f"{one.documents:,} documents"]
    else:
        parts = [f"about {one.documents:,} documents (estimated from {one.n_sampled} of {one.n_shards} shards)"]
    if one.text_bytes is not None:
        n_tokens = one.text_bytes * TOKENS_PER_BYTE
        parts.append(f"about {one.text_bytes / 1e6:,.1f} MB of text")
        parts.append(f"about {n_tokens / 1e6:,.1f} million tokens before filters and deduplication")
    return ", ".join(parts)


def _count_group(group: Sequence[PlannedShard], n_samples: int) -> SourceCounts:
    shard = group[0].shard
    if shard.kind == "hub":
        return SourceCounts(shard.source, shard.kind, len(group), 0, None, None, exact=False)
    sample = _Sample()
    for planned in _spread(group, n_samples):
        _read_beginning(planned, sample)
    total_bytes = sum(planned.shard.size_bytes for planned in group)
    share = total_bytes / sample.n_bytes if sample.n_bytes else 1.0
    documents, exact = round(sample.documents * share), sample.whole and sample.n_shards == len(group)
    if exact:
        documents = sample.documents
    elif shard.kind == "parquet":
        counted = _spread(group, EXACT_SHARDS)
        documents, exact = _rows(counted), len(counted) == len(group)
        if not exact:
            documents = round(documents * total_bytes / max(1, sum(planned.shard.size_bytes for planned in counted)))
    text_bytes = round(sample.text_bytes / sample.texts * documents) if sample.texts else None
    return SourceCounts(shard.source, shard.kind, len(group), sample.n_shards, documents, text_bytes, exact)


def _spread(group: Sequence[PlannedShard], n_at_most: int) -> list[PlannedShard]:
    """Evenly over a list: files in one order are seldom alike from the first to the last."""
    n = min(len(group), n_at_most)
    return [group[i * len(group) // n] for i in range(n)]


def _read_beginning(planned: PlannedShard, sample: _Sample) -> None:
    """Add the first megabytes of a shard to the sample."""
    position = n_records = 0
    sample.n_shards += 1
    # A reader is a generator: closed early, it closes its file.
    with closing(cast(Any, read_shard(planned.shard, planned.source))) as records:
        for record in records:
            if isinstance(record, Damage):
                continue
            # What was read ahead counts up to its end, so the sample stops where the file was read next.
            if record.position > position and (position >= SAMPLE_BYTES or n_records >= SAMPLE_RECORDS):
                sample.whole = False
                break
            position = max(position, record.position)
            n_records += 1
            if not record.reject:
                sample.documents += 1
            if record.text is not None:
                sample.texts += 1
                sample.text_bytes += len(record.text.encode())
        else:
            position = planned.shard.size_bytes
    sample.n_bytes += position


def _rows(group: Sequence[PlannedShard]) -> int:
    n_rows = 0
    for planned in group:
        with open_file(planned.shard.path) as file:
            try:
                n_rows += pq.read_metadata(file).num_rows
            except (pa.ArrowException, OSError):  # counted as damage by the run itself
                continue
    return n_rows
