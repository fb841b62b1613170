"""Plain pieces -> whole WARC records; whatever is no whole record is reported with its place and size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from data_pipeline.document import Damage
from data_pipeline.sources.record import MAX_RECORD_BYTES, Content, Piece

WARC_MAGIC = b"WARC/"
WARC_CONTENT = Content(lambda plain: plain.lstrip(b"\r\n").startswith(WARC_MAGIC), MAX_RECORD_BYTES)
"""Members hold a record or more; what a damaged one gives is thrown away, a record being worth less than the truth."""

_HEADER_END = re.compile(rb"\r?\n\r?\n")
_LENGTH = re.compile(rb"^content-length:\s*(\d{1,18})\s*$", re.IGNORECASE | re.MULTILINE)
_NEXT_RECORD = re.compile(rb"(?<=\n)WARC/\d")
_FOLLOWING_RECORD = re.compile(rb"\r?\n\r?\n(?=WARC/\d)")
_FOLLOWING_BYTES = 10
"""What `_FOLLOWING_RECORD` looks at."""
_RECORD_ENDS = (b"\r\n\r\n", b"\n\n", WARC_MAGIC)
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
    skipped: int = 0
    """Bytes of that record that came already."""

    def feed(self, piece: Piece) -> Iterator[Frame | Damage]:
        """Add a piece; yield what is complete."""
        if piece.starts_member and piece.data.startswith(WARC_MAGIC):
            # A record never reaches into a member that begins another one.
            yield from self.finish("warc.record_cut_short")
        if not self.buffer:
            self.offset = piece.offset
        self.position = piece.position
        self.buffer += piece.data
        if self.to_skip:
            yield from self._skip()
        if not self.to_skip:
            yield from self._complete_records()
        # What is left began, at the earliest, in this piece.
        if len(self.buffer) <= len(piece.data):
            self.offset = piece.offset

    def finish(self, reason: str) -> Iterator[Frame | Damage]:
        """End of the input, or of what can be read of it: an incomplete record is lost, one behind it is not."""
        while self.to_skip or self.buffer.strip():
            following = _FOLLOWING_RECORD.search(self.buffer)
            end = following.end() if following else len(self.buffer)
            why = "warc.record_too_large" if self.to_skip else "warc.wrong_length" if following else reason
            yield Damage(self.path, self.offset, why, self.skipped + len(self.buffer[:end].strip()))
            del self.buffer[:end]
            self.to_skip = self.skipped = 0
            yield from self._complete_records()
        self.forget()

    def forget(self) -> None:
        """Drop an incomplete record whose loss has been reported already."""
        self.buffer.clear()
        self.to_skip = self.skipped = 0

    def _skip(self) -> Iterator[Damage]:
        """Pass over a record that is too large, to its end or to where another one begins: its length may be wrong."""
        following = _FOLLOWING_RECORD.search(self.buffer, 0, self.to_skip + _FOLLOWING_BYTES)
        if following is not None:
            n_bytes, done = following.start(), True
        elif len(self.buffer) >= self.to_skip + _FOLLOWING_BYTES:
            n_bytes, done = self.to_skip, True
        else:
            # The last bytes stay: a beginning may lie on the border.
            n_bytes, done = min(max(len(self.buffer) - _FOLLOWING_BYTES, 0), self.to_skip), False
        del self.buffer[:n_bytes]
        self.skipped += n_bytes
        self.to_skip = 0 if done else self.to_skip - n_bytes
        if done:
            yield Damage(self.path, self.offset, "warc.record_too_large", self.skipped)
            self.skipped = 0

    def _complete_records(self) -> Iterator[Frame | Damage]:
        start = 0
        while True:
            start = _skip_line_ends(self.buffer, start)
            outcome = self._record_at(start)
            if outcome is not None:
                found, start = outcome
                yield found
                continue
            del self.buffer[:start]
            start = 0
            if self.to_skip:
                yield from self._skip()
            else:
                return
            if self.to_skip:
                return

    def _record_at(self, start: int) -> tuple[Frame | Damage, int] | None:
        """What begins at `start`, with its end, or None if more is needed or the record has to be skipped."""
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
            self.to_skip = end - start
            return None
        if end > len(self.buffer):
            return None
        if not self._ends_at(end):
            following = _FOLLOWING_RECORD.search(self.buffer, header.end() - 4, end + _FOLLOWING_BYTES)
            if following is not None:
                n_bytes = following.start() - start
                return Damage(self.path, self.offset, "warc.wrong_length", n_bytes), following.end()
        return Frame(bytes(self.buffer[start:end]), self.offset, self.position), end

    def _ends_at(self, end: int) -> bool:
        """Whether what follows is what follows a record; without it, Content-Length may be wrong."""
        following = bytes(self.buffer[end : end + 5])
        return any(following.startswith(ending) or ending.startswith(following) for ending in _RECORD_ENDS)

    def _garbage(self, start: int, reason: str) -> tuple[Damage, int]:
        following = _NEXT_RECORD.search(self.buffer, start + 1)
        end = following.start() if following else len(self.buffer)
        if not following:
            # The beginning of a record on the border of the buffer stays.
            line_end = self.buffer.rfind(b"\n", max(start + 1, end - len(WARC_MAGIC) - 1))
            if line_end >= 0 and WARC_MAGIC.startswith(bytes(self.buffer[line_end + 1 :])):
                end = line_end
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
