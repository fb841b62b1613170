"""Lines of a plain, gzip or zstd file, in bounded memory; behind a damaged stretch reading goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline.document import Damage
from data_pipeline.sources.record import MAX_RECORD_BYTES, Content
from data_pipeline.sources.streams import read_pieces

_NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1f]")


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end; numbers begin at 1 and count what was seen of lines, whole or not."""

    number: int
    data: bytes
    position: int
    """Byte on disk up to which the file has been read."""
    may_be_cut: bool = False
    """Damage lies before or behind it; it may be whole, or a part of a line."""


def read_lines(file: BinaryIO, path: str) -> Iterator[Line | Damage]:
    """Every line, in order; a line longer than MAX_RECORD_BYTES, and a stretch that cannot be read, as Damage."""
    lines = _Lines(path)
    # Lines are given out before the checksum is read: a file may be one member of any size.
    for piece in read_pieces(file, path, Content(_begins_text, 0)):
        if isinstance(piece, Damage):
            yield from lines.finish(cut=True)
            yield piece
        else:
            yield from lines.feed(piece.data, piece.position)
    yield from lines.finish(cut=False)


@dataclass(slots=True)
class _Lines:
    path: str
    number: int = 1
    pending: bytearray | None = None
    """The line that has begun; None while one too long to hold is skipped."""
    skipped: int = 0
    position: int = 0
    after_damage: bool = False

    def feed(self, data: bytes, position: int) -> Iterator[Line | Damage]:
        self.position = position
        first, *following = data.split(b"\n")
        self._add(first)
        for start in following:
            yield self._end(cut=False)
            self._add(start)

    def finish(self, *, cut: bool) -> Iterator[Line | Damage]:
        """End of the file, or of what can be read before a damaged stretch."""
        if self.pending or self.skipped:
            yield self._end(cut=cut)
        self.pending = None
        self.after_damage = cut

    def _add(self, data: bytes) -> None:
        if self.skipped:
            self.skipped += len(data)
            return
        if self.pending is None:
            self.pending = bytearray()
        self.pending += data
        if len(self.pending) > MAX_RECORD_BYTES:
            self.skipped, self.pending = len(self.pending), None

    def _end(self, *, cut: bool) -> Line | Damage:
        found: Line | Damage
        if self.skipped:
            found = Damage(self.path, self.number, "line_too_long", self.skipped, unit="line")
        else:
            found = Line(self.number, bytes(self.pending or b""), self.position, cut or self.after_damage)
        self.number += 1
        self.skipped, self.pending, self.after_damage = 0, None, False
        return found


def _begins_text(plain: bytes) -> bool:
    return bool(plain) and _NO_TEXT.search(plain) is None
