"""A file of gzip members as bounded pieces of plain bytes; behind damage the scan goes on at the next member.

A WARC file is a row of gzip members, usually one a record. Readers that leave the members to zlib stop at the first
damaged one, silently where the file is cut off.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from data_pipeline.document import Damage
from data_pipeline.sources.record import CHUNK_BYTES, Content, Piece

GZIP_MAGIC = b"\x1f\x8b\x08"
_GZIP_WINDOW = 31  # zlib's code for "gzip header, largest window"
_READ_BYTES = 2**16
_TRIAL_BYTES = 512
"""Compressed bytes that decide whether a magic number begins a member; chance does not inflate so far."""
_TRIAL_PLAIN_BYTES = 256
_RETRY_BYTES = 16
"""Step in which a read that failed is done again, for the sake of what comes before the damage."""


def read_members(file: BinaryIO, path: str, size: int, content: Content) -> Iterator[Piece | Damage]:
    """The inflated content in order; a Damage for every stretch that could not be inflated or is not to be trusted.

    Reasons: `gzip.no_member` (the file does not begin with one), `gzip.damaged`, `gzip.checksum` (all of a member was
    inflated, but is not what was once compressed), `gzip.truncated` (the file ends inside a member).
    """
    offset = 0
    file.seek(0)
    if size and file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
        offset = _next_member(file, 0, size, content)
        yield Damage(path, 0, "gzip.no_member", offset)
    while offset < size:
        member = _Member(offset, content.hold_bytes)
        try:
            offset = yield from member.inflate(file)
        except EOFError:
            resume = _next_member(file, offset + 1, size, content)
            if resume == size:
                yield from member.held
            # With members behind it, the file is not cut: this one ran on over them.
            yield Damage(path, offset, "gzip.truncated" if resume == size else "gzip.damaged", resume - offset)
            offset = resume
        except zlib.error as error:
            if _only_zeros(file, offset):
                return  # tape padding, which gzip itself allows
            resume = _next_member(file, offset + 1, size, content)
            checksum = "incorrect" in str(error) and "check" in str(error) and "header" not in str(error)
            yield Damage(path, offset, "gzip.checksum" if checksum else "gzip.damaged", resume - offset)
            offset = resume


@dataclass(slots=True)
class _Member:
    offset: int
    hold_bytes: int
    held: list[Piece] = field(default_factory=list)
    held_bytes: int = 0
    first: bool = True

    def inflate(self, file: BinaryIO) -> Generator[Piece, None, int]:
        """Yield the member's content; return where the next one begins.

        Raises:
            EOFError: the file ends inside the member; what could be inflated has been yielded or is in `held`.
            zlib.error: the member is damaged; what came before has been yielded unless it is held back.
        """
        file.seek(self.offset)
        inflater = zlib.decompressobj(_GZIP_WINDOW)
        while not inflater.eof:
            waiting = inflater.unconsumed_tail or file.read(_READ_BYTES)
            before = inflater.copy() if not self._holds() else None
            try:
                data = inflater.decompress(waiting, CHUNK_BYTES)
            except zlib.error:
                if before is not None:
                    yield from self._take(_inflate_until_error(before, waiting), file.tell())
                raise
            yield from self._take(data, file.tell())
            if not waiting:
                raise EOFError
        yield from self.held
        return file.tell() - len(inflater.unused_data)

    def _holds(self) -> bool:
        return self.held_bytes <= self.hold_bytes and self.hold_bytes > 0

    def _take(self, data: bytes, position: int) -> Iterator[Piece]:
        if not data:
            return
        self.held.append(Piece(data, self.offset, self.first, position))
        self.held_bytes += len(data)
        self.first = False
        if not self._holds():
            yield from self.held
            self.held.clear()


def _inflate_until_error(inflater: zlib._Decompress, waiting: bytes) -> bytes:
    """What a failed call had inflated before it failed: zlib keeps that to itself."""
    parts: list[bytes] = []
    try:
        for at in range(0, len(waiting), _RETRY_BYTES):
            parts.append(inflater.decompress(waiting[at : at + _RETRY_BYTES]))
    except zlib.error:
        pass
    return b"".join(parts)


def _next_member(file: BinaryIO, start: int, size: int, content: Content) -> int:
    """Where, from `start` on, a gzip member begins that holds what it should; `size` if nowhere."""
    offset = start
    while offset < size:
        file.seek(offset)
        chunk = file.read(CHUNK_BYTES)
        at = chunk.find(GZIP_MAGIC)
        while at >= 0:
            if _is_member(chunk[at : at + _TRIAL_BYTES], content):
                return offset + at
            at = chunk.find(GZIP_MAGIC, at + 1)
        # Chunks overlap, so that a member's beginning on the border is seen whole.
        offset += max(len(chunk) - _TRIAL_BYTES, 1) if len(chunk) == CHUNK_BYTES else len(chunk)
    return size


def _is_member(start: bytes, content: Content) -> bool:
    inflater = zlib.decompressobj(_GZIP_WINDOW)
    try:
        plain = inflater.decompress(start, _TRIAL_PLAIN_BYTES)
    except zlib.error:
        return False
    return content.begins(plain)


def _only_zeros(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    while chunk := file.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            return False
    return True
