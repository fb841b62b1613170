"""One document a file."""

from __future__ import annotations

from data_pipeline.document import Damage, Shard
from data_pipeline.sources.files import open_file
from data_pipeline.sources.record import MAX_RECORD_BYTES, RawRecord, Records


def read_txt(shard: Shard) -> Records:
    """The whole file as one text, in UTF-8 with or without a byte order mark; anything else is a Damage."""
    with open_file(shard.path) as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        yield Damage(shard.path, 0, "txt.too_large", shard.size_bytes or len(data), unit="file")
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Damage(shard.path, error.start, "txt.not_utf8", len(data), unit="file")
        return
    yield RawRecord(0, shard.path, text=text, position=len(data))
