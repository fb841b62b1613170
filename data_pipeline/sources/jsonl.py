"""One JSON object a line, plain, .gz or .zst: The Pile's format and most others'.

The Pile writes {"text": ..., "meta": {"pile_set_name": ...}}. Source: Gao et al. 2020, the-pile/pile.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from data_pipeline.document import Damage, Shard
from data_pipeline.sources.files import open_file
from data_pipeline.sources.line_reader import Line, read_lines
from data_pipeline.sources.record import RawRecord, Records, scalar_meta


def read_jsonl(shard: Shard, text_key: str) -> Records:
    """One record a line; a line's ordinal is its number minus one, whatever became of the lines before it.

    A line that is no object with a text is a Damage of unit `line`, and reading goes on.
    """
    with open_file(shard.path) as file:
        for line in read_lines(file, shard.path):
            if isinstance(line, Damage):
                yield line
            elif line.data.strip():
                yield _parse(line, shard.path, text_key)


def _parse(line: Line, path: str, text_key: str) -> RawRecord | Damage:
    try:
        row = orjson.loads(line.data)
    except orjson.JSONDecodeError:
        reason = "json.not_utf8" if _is_not_utf8(line.data) else "json.invalid"
        return Damage(path, line.number, reason, len(line.data), unit="line")
    if not isinstance(row, dict):
        return Damage(path, line.number, "json.not_an_object", len(line.data), unit="line")
    if text_key not in row:
        return Damage(path, line.number, "json.no_text_key", len(line.data), unit="line")
    text = row[text_key]
    if not isinstance(text, str):
        return Damage(path, line.number, "json.text_not_a_string", len(line.data), unit="line")
    meta = scalar_meta(row.get("meta")) | scalar_meta(row.get("metadata"))
    url = next(_addresses(row, meta), f"{path}:{line.number}")
    return RawRecord(line.number - 1, url, text=text, meta=meta, position=line.position)


def _addresses(row: dict[str, object], meta: dict[str, str]) -> Iterator[str]:
    for value in (row.get("url"), meta.get("url")):
        if isinstance(value, str) and value:
            yield value


def _is_not_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return True
    return False
