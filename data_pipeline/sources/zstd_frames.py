"""A file of zstd frames as bounded pieces of plain bytes; behind damage the scan goes on at the next frame.

Frames are fed to the decoder block by block, so that every whole block before a damaged one is given out, and no call
gives more than a block (128 KiB). Source of the format: RFC 8878, section 3.1.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import zstandard

from data_pipeline.document import Damage
from data_pipeline.sources.record import CHUNK_BYTES, Content, Piece
from megagpt.errors import DataError

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC_END = b"\x2a\x4d\x18"
_SKIPPABLE_FIRST_BYTES = range(0x50, 0x60)
_HEADER_BYTES = 18
"""The longest frame header."""
_BLOCK_BYTES = 128 * 2**10
_BLOCK_RLE, _BLOCK_RESERVED = 1, 3
_MAX_WINDOW_BYTES = 2**27
"""The window that `zstd -d` accepts without being asked; larger ones are for --long=31 and cost a worker's memory."""


class _FrameError(Exception):
    """A frame cannot be read on; its message is the reason's name."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(reason)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class _Block:
    data: bytes
    offset: int


def is_frame_start(head: bytes) -> bool:
    """Whether a zstd frame or a skippable one begins with these four bytes."""
    return head[:4] == ZSTD_MAGIC or _is_skippable(head)


def read_frames(file: BinaryIO, path: str, size: int, content: Content) -> Iterator[Piece | Damage]:
    """The plain content in order; a Damage for every stretch that could not be decoded or is not to be trusted.

    Reasons: `zstd.no_frame`, `zstd.damaged`, `zstd.checksum` (all of a frame was decoded, but is not what was once
    compressed), `zstd.truncated` (the file ends inside a frame), `zstd.window_too_large` (over 128 MiB),
    `zstd.needs_dictionary`.

    Raises:
        DataError: frames need a dictionary, such as some .warc.zst files begin with.
    """
    offset = 0
    held: list[Piece]
    while offset < size:
        try:
            offset = yield from _read_frame(file, offset, content, held := [])
        except _FrameError as error:
            resume = _next_frame(file, offset + 1, size, content)
            reason = str(error)
            if reason == "zstd.needs_dictionary":
                _refuse_dictionary(file, path, offset, size)
            if reason == "zstd.truncated" and resume == size:
                yield from held
            elif reason == "zstd.truncated":
                reason = "zstd.damaged"  # with frames behind it, the file is not cut: this one ran on over them
            start = error.offset if offset <= error.offset < resume else offset
            yield Damage(path, start, reason, resume - start)
            offset = resume


def _read_frame(file: BinaryIO, offset: int, content: Content, held: list[Piece]) -> Generator[Piece, None, int]:
    """Yield the content of the frame at `offset`; return where the next one begins.

    `held` has what is held back, also after a _FrameError.
    """
    file.seek(offset)
    head = file.read(_HEADER_BYTES)
    if _is_skippable(head):
        end = offset + 8 + int.from_bytes(head[4:8], "little")
        if len(head) < 8 or end > file.seek(0, 2):
            raise _FrameError("zstd.truncated", offset)
        return end
    header_bytes, has_checksum = _parse_header(head, offset)
    decoder = _decoder(head[:header_bytes], offset)
    file.seek(offset + header_bytes)
    held_bytes = 0
    for data in _decode_blocks(file, decoder, offset, offset + header_bytes, has_checksum=has_checksum):
        held.append(Piece(data, offset, held_bytes == 0, file.tell()))
        held_bytes += len(data)
        if held_bytes > content.hold_bytes:
            yield from held
            held.clear()
    yield from held
    return file.tell()


def _decode_blocks(file: BinaryIO, decoder: Any, offset: int, start: int, *, has_checksum: bool) -> Iterator[bytes]:
    """The content of each block that has any; a whole block is decoded by the call that brings its last byte."""
    for block in _blocks(file, start):
        data = _decode(decoder, block.data, "zstd.damaged", block.offset)
        if data:
            yield data
    if has_checksum:
        checksum = file.read(4)
        if len(checksum) < 4:
            raise _FrameError("zstd.truncated", offset)
        _decode(decoder, checksum, "zstd.checksum", offset)
    if not decoder.eof:
        raise _FrameError("zstd.damaged", offset)


def _decoder(header: bytes, offset: int) -> Any:
    decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
    _decode(decoder, header, "zstd.damaged", offset)
    return decoder


def _decode(decoder: Any, data: bytes, reason: str, offset: int) -> bytes:
    try:
        plain: bytes = decoder.decompress(data)
    except zstandard.ZstdError:
        raise _FrameError(reason, offset) from None
    return plain


def _parse_header(head: bytes, offset: int) -> tuple[int, bool]:
    """Length of the frame header, and whether a checksum follows the last block."""
    if not head.startswith(ZSTD_MAGIC):
        raise _FrameError("zstd.truncated" if ZSTD_MAGIC.startswith(head) else "zstd.no_frame", offset)
    try:
        n_bytes: int = zstandard.frame_header_size(head)
        frame = zstandard.get_frame_parameters(head)
    except zstandard.ZstdError:
        raise _FrameError("zstd.truncated" if len(head) < _HEADER_BYTES else "zstd.damaged", offset) from None
    if frame.window_size > _MAX_WINDOW_BYTES:
        raise _FrameError("zstd.window_too_large", offset)
    if frame.dict_id:
        raise _FrameError("zstd.needs_dictionary", offset)
    return n_bytes, bool(frame.has_checksum)


def _blocks(file: BinaryIO, offset: int) -> Iterator[_Block]:
    while True:
        header = file.read(3)
        if len(header) < 3:
            raise _FrameError("zstd.truncated", offset)
        bits = int.from_bytes(header, "little")
        kind, n_bytes = bits >> 1 & 3, bits >> 3
        if kind == _BLOCK_RESERVED or n_bytes > _BLOCK_BYTES:
            raise _FrameError("zstd.damaged", offset)
        data = file.read(1 if kind == _BLOCK_RLE else n_bytes)
        if len(data) < (1 if kind == _BLOCK_RLE else n_bytes):
            raise _FrameError("zstd.truncated", offset)
        yield _Block(header + data, offset)
        if bits & 1:
            return
        offset += 3 + len(data)


def _next_frame(file: BinaryIO, start: int, size: int, content: Content) -> int:
    """Where, from `start` on, a frame begins that holds what it should; `size` if nowhere."""
    return next((offset for offset in _magic_numbers(file, start, size) if _is_frame(file, offset, content)), size)


def _magic_numbers(file: BinaryIO, start: int, size: int) -> Iterator[int]:
    offset = start
    while offset < size:
        file.seek(offset)
        chunk = file.read(CHUNK_BYTES)
        at = chunk.find(ZSTD_MAGIC)
        while at >= 0:
            yield offset + at
            at = chunk.find(ZSTD_MAGIC, at + 1)
        # Chunks overlap, so that a magic number on the border is seen.
        offset += max(len(chunk) - len(ZSTD_MAGIC) + 1, 1) if len(chunk) == CHUNK_BYTES else len(chunk)


def _refuse_dictionary(file: BinaryIO, path: str, offset: int, size: int) -> None:
    """A flipped bit makes one frame ask for a dictionary; where another asks for the same one, the file was made so."""
    wanted = _dictionary(file, offset)
    if any(_dictionary(file, other) == wanted for other in _magic_numbers(file, offset + 1, size)):
        raise DataError(
            f"{path}: the zstd frame at byte {offset} needs dictionary {wanted}, and dictionaries are not read. "
            "Write the file anew without one: `zstd -d` with its dictionary, then `zstd`"
        )


def _dictionary(file: BinaryIO, offset: int) -> int:
    file.seek(offset)
    try:
        return int(zstandard.get_frame_parameters(file.read(_HEADER_BYTES)).dict_id)
    except zstandard.ZstdError:
        return 0


def _is_frame(file: BinaryIO, offset: int, content: Content) -> bool:
    trial = Content(content.begins, 0)
    try:
        first = next(_read_frame(file, offset, trial, []), None)
    except _FrameError:
        return False
    return first is not None and content.begins(first.data[:256])


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 4 and head[0] in _SKIPPABLE_FIRST_BYTES and head[1:4] == _SKIPPABLE_MAGIC_END
