"""A file of gzip members as bounded pieces of plain bytes, with every damaged stretch named.

A WARC file is a row of gzip members, usually one a record. Readers that leave the members to zlib stop at the first
damaged one, silently where the file is cut off; here the scan goes on at the next member that holds a record.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline.document import Damage
from data_pipeline.sources.record import CHUNK_BYTES, MAX_RECORD_BYTES

GZIP_MAGIC = b"\x1f\x8b\x08"
WARC_MAGIC = b"WARC/"
_GZIP_WINDOW = 31  # zlib's code for "gzip header, largest window"
_READ_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Piece:
    """Plain bytes, at most a chunk of them."""

    data: bytes
    offset: int
    """Byte on disk at which its gzip member (or, uncompressed, the piece itself) begins."""
    starts_member: bool
    position: int
    """Byte on disk up to which the file has been read."""


def read_pieces(file: BinaryIO, path: str) -> Iterator[Piece | Damage]:
    """The inflated content of a file, or its content where it is not compressed.

    Args:
        file: a seekable file, buffered by at least 64 KiB.
        path: its name, for the damage reports.

    Yields:
        Pieces in order, and a Damage for every stretch that could not be inflated. The bytes of a member of at most
        MAX_RECORD_BYTES are held back until its checksum is right; larger ones must be believed as they come.
    """
    size = file.seek(0, 2)
    file.seek(0)
    compressed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    file.seek(0)
    if not compressed and path.endswith(".gz"):
        resume = _next_member(file, 0, size)
        if size:
            yield Damage(path, 0, "gzip.no_member", resume)
        compressed, offset = True, resume
    else:
        offset = 0
    if not compressed:
        yield from _plain_pieces(file)
        return
    while offset < size:
        try:
            offset = yield from _inflate_member(file, offset)
        except (zlib.error, EOFError) as error:
            if isinstance(error, zlib.error) and _only_zeros(file, offset):
                return  # tape padding, which gzip itself allows
            reason = "gzip.truncated" if isinstance(error, EOFError) else "gzip.damaged"
            resume = _next_member(file, offset + 1, size)
            yield Damage(path, offset, reason, resume - offset)
            offset = resume


def _plain_pieces(file: BinaryIO) -> Iterator[Piece]:
    offset = 0
    while data := file.read(CHUNK_BYTES):
        yield Piece(data, offset, starts_member=False, position=offset + len(data))
        offset += len(data)


def _inflate_member(file: BinaryIO, offset: int) -> Generator[Piece, None, int]:
    """Yield the member that begins at `offset`; return where the next one begins.

    Raises:
        EOFError: the file ends inside the member; what could be inflated has been yielded.
        zlib.error: the member is damaged; held-back bytes are not yielded.
    """
    file.seek(offset)
    inflater = zlib.decompressobj(_GZIP_WINDOW)
    held: list[Piece] = []
    held_bytes = 0
    first = True
    waiting = b""
    while not inflater.eof:
        waiting = inflater.unconsumed_tail or file.read(_READ_BYTES)
        data = inflater.decompress(waiting, CHUNK_BYTES)
        if data:
            held.append(Piece(data, offset, first, file.tell()))
            held_bytes += len(data)
            first = False
        if not waiting:
            yield from held
            raise EOFError
        if held_bytes > MAX_RECORD_BYTES:
            yield from held
            held.clear()
    yield from held
    return file.tell() - len(inflater.unused_data)


def _next_member(file: BinaryIO, start: int, size: int) -> int:
    """Where, from `start` on, a gzip member begins whose content begins a WARC record; `size` if nowhere."""
    offset = start
    while offset < size:
        file.seek(offset)
        chunk = file.read(CHUNK_BYTES)
        at = chunk.find(GZIP_MAGIC)
        while at >= 0:
            if _holds_record(file, offset + at):
                return offset + at
            at = chunk.find(GZIP_MAGIC, at + 1)
        # Chunks overlap, so that a magic number on the border is seen.
        offset += max(len(chunk) - len(GZIP_MAGIC) + 1, 1)
    return size


def _holds_record(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    try:
        start = zlib.decompressobj(_GZIP_WINDOW).decompress(file.read(_READ_BYTES), 256)
    except zlib.error:
        return False
    return start.lstrip(b"\r\n").startswith(WARC_MAGIC)


def _only_zeros(file: BinaryIO, offset: int) -> bool:
    file.seek(offset)
    while chunk := file.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            return False
    return True
