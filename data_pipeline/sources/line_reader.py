"""Lines of a plain, gzip or zstd file, in bounded memory, with a cut or damaged stream reported."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import zstandard

from data_pipeline.document import Damage
from data_pipeline.sources.record import CHUNK_BYTES, MAX_RECORD_BYTES

_GZIP_WINDOW = 31
_ZSTD_READ_BYTES = 2048
"""zstd cannot be told to stop at a size; 2 KiB are at most 512 blocks of 128 KiB, 64 MiB. Source: RFC 8878, 3.1.1.2."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its end; numbers begin at 1."""

    number: int
    data: bytes
    position: int


def read_lines(file: BinaryIO, path: str) -> Iterator[Line | Damage]:
    """Every line, in order; a line longer than MAX_RECORD_BYTES, and a stream that cannot be read on, as Damage."""
    number = 1
    pending = b""
    too_long = 0
    for chunk in _chunks(file, path):
        if isinstance(chunk, Damage):
            yield chunk
            return  # the line begun before the damage is part of it
        first, *following = chunk.split(b"\n")
        if too_long:
            too_long += len(first)
        else:
            pending += first
        for start in following:
            if too_long:
                yield Damage(path, number, "line_too_long", too_long, unit="line")
            else:
                yield Line(number, pending, file.tell())
            number, too_long, pending = number + 1, 0, start
        if len(pending) > MAX_RECORD_BYTES:
            too_long, pending = len(pending), b""
    if too_long:
        yield Damage(path, number, "line_too_long", too_long, unit="line")
    elif pending:
        yield Line(number, pending, file.tell())


def _chunks(file: BinaryIO, path: str) -> Iterator[bytes | Damage]:
    if path.endswith(".gz"):
        yield from _inflated(file, path)
    elif path.endswith(".zst"):
        yield from _unzstd(file, path)
    else:
        while data := file.read(CHUNK_BYTES):
            yield data


def _inflated(file: BinaryIO, path: str) -> Iterator[bytes | Damage]:
    size = file.seek(0, 2)
    offset = file.seek(0)
    while offset < size:
        inflater = zlib.decompressobj(_GZIP_WINDOW)
        file.seek(offset)
        while not inflater.eof:
            waiting = inflater.unconsumed_tail or file.read(CHUNK_BYTES)
            try:
                data = inflater.decompress(waiting, CHUNK_BYTES)
            except zlib.error:
                yield Damage(path, offset, "gzip.damaged", size - offset)
                return
            if data:
                yield data
            elif not waiting:
                yield Damage(path, offset, "gzip.truncated", size - offset)
                return
        offset = file.tell() - len(inflater.unused_data)


def _unzstd(file: BinaryIO, path: str) -> Iterator[bytes | Damage]:
    size = file.seek(0, 2)
    file.seek(0)
    frame_offset = 0
    frame = zstandard.ZstdDecompressor().decompressobj()
    waiting = b""
    while waiting or (waiting := file.read(_ZSTD_READ_BYTES)):
        try:
            data = frame.decompress(waiting)
        except zstandard.ZstdError:
            yield Damage(path, frame_offset, "zstd.damaged", size - frame_offset)
            return
        waiting = b""
        if data:
            yield data
        if frame.eof:
            waiting = frame.unused_data
            frame_offset = file.tell() - len(waiting)
            frame = zstandard.ZstdDecompressor().decompressobj()
    if frame_offset < size:
        yield Damage(path, frame_offset, "zstd.truncated", size - frame_offset)
