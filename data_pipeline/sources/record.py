"""What every reader yields, before extraction and filtering."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from data_pipeline.document import Damage

MAX_RECORD_BYTES = 64 * 2**20
"""No single line, record or page may be larger, as it lies or inflated: a bomb costs a Damage, not the memory."""

CHUNK_BYTES = 2**20
"""How much is read or inflated at a time."""


@dataclass(slots=True)
class RawRecord:
    """One record of a shard: either `html` (undecoded) or `text`, or the reason why it is neither."""

    ordinal: int
    """Position in the shard; the lower half of the document's id."""
    url: str
    text: str | None = None
    html: bytes = b""
    content_type: str = ""
    charset: str = ""
    """What the HTTP header said; empty where it said nothing."""
    meta: dict[str, str] = field(default_factory=dict)
    reject: str = ""
    """Why the record is no document (`not_response`, `http_status` ...); empty where it may be one."""
    position: int = 0
    """Bytes of the file read so far, for progress."""


Records = Iterator[RawRecord | Damage]


def scalar_meta(meta: object) -> dict[str, str]:
    """The members of a record's meta object that are single values, as text."""
    if not isinstance(meta, dict):
        return {}
    return {str(key): str(value) for key, value in meta.items() if isinstance(value, str | int | float)}
