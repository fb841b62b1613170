"""Plain pieces -> whole WARC records; whatever is no whole record is reported with its place and size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_pipeline.document import Damage
from data_pipeline.sources.gzip_members import WARC_MAGIC, Piece
from data_pipeline.sources.record import MAX_RECORD_BYTES

_HEADER_END = re.compile(rb"\r?\n\r?\n")
_LENGTH = re.compile(rb"^content-length:\s*(\d{1,18})\s*$", re.IGNORECASE | re.MULTILINE)
_NEXT_RECORD = re.compile(rb"(?<=\n)WARC/\d")
_MAX_HEADER_BYTES = 64 * 2**10


@dataclass(frozen=True, slots=True)
class Frame:
    """One whole record: header lines, blank line, and exactly Content-Length bytes."""

    data: bytes
    offset: int
    """Byte on disk of the gzip member (or piece) in which it begins."""
    position: int


@dataclass(slots=True)
class _Framer:
    path: str
    buffer: bytearray = field(default_factory=bytearray)
    offset: int = 0
    position: int = 0
    to_skip: int = 0
    """Bytes still to come of a record that is too large to hold."""

    def feed(self, piece: Piece) -> Iterator[Frame | Damage]:
        """Add a piece; yield what is complete."""
        if piece.starts_member and piece.data.startswith(WARC_MAGIC):
            # A record never reaches into a member that begins another one.
            yield from self.finish("warc.record_cut_short")
        if not self.buffer:
            self.offset = piece.offset
        self.position = piece.position
        skipped = min(self.to_skip, len(piece.data))
        self.to_skip -= skipped
        self.buffer += piece.data[skipped:]
        if not self.to_skip:
            yield from self._complete_records()
        # What is left began, at the earliest, in this piece.
        if len(self.buffer) <= len(piece.data):
            self.offset = piece.offset

    def finish(self, reason: str) -> Iterator[Damage]:
        """End of the input, or of what can be read of it: an incomplete record is lost."""
        left = len(self.buffer.strip())
        if left or self.to_skip:
            yield Damage(self.path, self.offset, reason, left + self.to_skip)
        self.forget()

    def forget(self) -> None:
        """Drop an incomplete record whose loss has been reported already."""
        self.buffer.clear()
        self.to_skip = 0

    def _complete_records(self) -> Iterator[Frame | Damage]:
        start = 0
        while True:
            start = _skip_line_ends(self.buffer, start)
            outcome = self._record_at(start)
            if outcome is None:
                break
            found, end = outcome
            if found is not None:
                yield found
            self.to_skip = max(0, end - len(self.buffer))
            start = min(end, len(self.buffer))
        del self.buffer[:start]

    def _record_at(self, start: int) -> tuple[Frame | Damage | None, int] | None:
        """What begins at `start`, with its end (which may lie beyond the buffer), or None if more is needed."""
        head = bytes(self.buffer[start : start + len(WARC_MAGIC)])
        if not WARC_MAGIC.startswith(head):
            return self._garbage(start, "warc.garbage")
        header = _HEADER_END.search(self.buffer, start, start + _MAX_HEADER_BYTES)
        if header is None:
            too_long = len(self.buffer) - start >= _MAX_HEADER_BYTES
            return self._garbage(start, "warc.header_without_end") if too_long else None
        length = _LENGTH.search(self.buffer, start, header.end())
        if length is None:
            return self._garbage(start, "warc.no_content_length")
        end = header.end() + int(length[1])
        if end - start > MAX_RECORD_BYTES:
            return Damage(self.path, self.offset, "warc.record_too_large", end - start), end
        if end > len(self.buffer):
            return None
        return Frame(bytes(self.buffer[start:end]), self.offset, self.position), end

    def _garbage(self, start: int, reason: str) -> tuple[Damage, int]:
        following = _NEXT_RECORD.search(self.buffer, start + 1)
        end = following.start() if following else len(self.buffer)
        return Damage(self.path, self.offset, reason, end - start), end


def frame_records(pieces: Iterator[Piece | Damage], path: str) -> Iterator[Frame | Damage]:
    """Cut pieces into records; memory is bounded by the largest record, itself at most MAX_RECORD_BYTES."""
    framer = _Framer(path)
    for piece in pieces:
        if isinstance(piece, Damage):
            framer.forget()
            yield piece
        else:
            yield from framer.feed(piece)
    yield from framer.finish("warc.truncated")


def _skip_line_ends(buffer: bytearray, start: int) -> int:
    while start < len(buffer) and buffer[start] in b"\r\n":
        start += 1
    return start
