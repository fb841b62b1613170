"""The noun that every stage handles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Document:
    """One text with where it came from.

    `doc_id` is shard ordinal << 32 | record ordinal, fixed at ingestion and carried in every row that follows; no
    later stage may count positions instead.
    """

    doc_id: int
    text: str
    source: str
    """Name of the source in the job's configuration."""
    url: str = ""
    """Address of a web page, or `file:record` for other formats."""
    meta: dict[str, str] = field(default_factory=dict)
    """What the record itself said: pile_set_name, language, date ..."""
    failed: list[str] = field(default_factory=list)
    """Every rule that the document failed, as `filter.rule`; empty means it is kept."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A file (or slice of a data set) that one map task reads from beginning to end."""

    ordinal: int
    """Position in the job's list of shards; the upper half of its documents' ids."""
    source: str
    kind: str
    path: str
    size_bytes: int
    """0 where it cannot be known beforehand (hub data sets)."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in a shard that could not be read; counted and reported, never passed over in silence."""

    path: str
    offset: int
    """Byte in the file as it lies on disk, or line number where `unit` says so."""
    reason: str
    bytes_lost: int = 0
    unit: str = "byte"


@dataclass(slots=True)
class ShardCounts:
    """Conservation of one map task: records = kept + the sum of rejected."""

    records: int = 0
    kept: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Reason -> documents; a document that fails several rules counts under the first."""
    failed_rules: dict[str, int] = field(default_factory=dict)
    """Rule -> documents that fail it, all rules of a document counted."""
    damage: list[Damage] = field(default_factory=list)
    """The first of the damages, so that a file of bad lines does not fill the memory; `damage_count` has all."""
    text_bytes_in: int = 0
    """UTF-8 bytes of the texts that extraction gave."""
    text_bytes_kept: int = 0
    damage_count: int = 0
    bytes_lost: int = 0
    languages: dict[str, int] = field(default_factory=dict)
    """Language -> documents it was found in, before filtering."""
    kept_by_language: dict[str, int] = field(default_factory=dict)
    thresholds: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every threshold in use by filter, and those of `language`."""
