"""A file, compressed or not, as bounded pieces of plain bytes, with every stretch named that could not be read.

The compression is told from the file's first bytes and, where those are damaged, from its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.document import Damage
from data_pipeline.sources.gzip_members import GZIP_MAGIC, read_members
from data_pipeline.sources.record import CHUNK_BYTES, Content, Piece
from data_pipeline.sources.zstd_frames import is_frame_start, read_frames


def read_pieces(file: BinaryIO, path: str, content: Content) -> Iterator[Piece | Damage]:
    """The content of a file in order, however it is compressed, and a Damage for every stretch that is lost.

    Args:
        file: a seekable, buffered file.
        path: its name, for the damage reports.
        content: what the members of the file hold, and how much of one is held back until its checksum is right.

    Raises:
        DataError: a zstd frame needs a dictionary.
    """
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(4)
    if head.startswith(GZIP_MAGIC) or (path.endswith(".gz") and not is_frame_start(head)):
        yield from read_members(file, path, size, content)
    elif is_frame_start(head) or path.endswith(".zst"):
        yield from read_frames(file, path, size, content)
    else:
        offset = file.seek(0)
        while data := file.read(CHUNK_BYTES):
            yield Piece(data, offset, starts_member=False, position=offset + len(data))
            offset += len(data)
