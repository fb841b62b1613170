"""The noun that every stage handles."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """Every rule that the document failed, as `filter.threshold`; empty means it is kept."""
    measures: dict[str, float] = field(default_factory=dict)
    """What the filters measured, as `filter.measure`: thresholds can be decided anew from these."""


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
