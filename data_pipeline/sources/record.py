"""What every reader yields, before extraction and filtering."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data_pipeline.document import Damage

MAX_RECORD_BYTES = 64 * 2**20
"""No single line, record or page may be larger, as it lies or inflated: a bomb costs a Damage, not the memory."""

CHUNK_BYTES = 2**20
"""How much is read or inflated at a time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Plain bytes of a file, about a chunk of them at most."""

    data: bytes
    offset: int
    """Byte on disk at which its gzip member or zstd frame (or, uncompressed, the piece itself) begins."""
    starts_member: bool
    position: int
    """Byte on disk up to which the file has been read."""


@dataclass(frozen=True, slots=True)
class Content:
    """What the gzip members or zstd frames of a file hold."""

    begins: Callable[[bytes], bool]
    """Whether a member may begin with these plain bytes: tells real members from chance behind damage."""
    hold_bytes: int
    """A member of up to so many plain bytes is given out only once its checksum is right; 0: believed as it comes."""


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
