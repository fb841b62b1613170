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
from megagpt.errors import DataError

_ENOUGH_LINES = 100
"""Lines without the text's field, from the first one on, that are the configuration's mistake and not the lines'."""


def read_jsonl(shard: Shard, text_key: str) -> Records:
    """One record a line; a line's ordinal is its number minus one, whatever became of the lines before it.

    A line that is no object with a text is a Damage of unit `line`, and reading goes on; so is the part of a line that
    a damaged stretch has left at its edge.

    Raises:
        DataError: none of the first 100 objects has the field `text_key`.
    """
    n_without_text = 0
    with open_file(shard.path) as file:
        for line in read_lines(file, shard.path):
            if isinstance(line, Damage):
                yield line
            elif line.data.strip():
                found = _parse(line, shard.path, text_key)
                yield found
                if isinstance(found, RawRecord):
                    n_without_text = -1
                elif found.reason == "json.no_text_key" and n_without_text >= 0:
                    n_without_text += 1
                    if n_without_text == _ENOUGH_LINES:
                        keys = ", ".join(sorted(map(str, orjson.loads(line.data))))
                        raise DataError(
                            f"{shard.path}: none of the first {_ENOUGH_LINES} lines has a field {text_key!r}; line "
                            f"{line.number} has {keys}. Set the source's text_key"
                        )


def _parse(line: Line, path: str, text_key: str) -> RawRecord | Damage:
    try:
        row = orjson.loads(line.data)
    except orjson.JSONDecodeError:
        return _bad(line, path, "json.not_utf8" if _is_not_utf8(line.data) else "json.invalid")
    if not isinstance(row, dict):
        return _bad(line, path, "json.not_an_object")
    if text_key not in row:
        return _bad(line, path, "json.no_text_key")
    text = row[text_key]
    if not isinstance(text, str):
        return _bad(line, path, "json.text_not_a_string")
    meta = scalar_meta(row.get("meta")) | scalar_meta(row.get("metadata"))
    url = next(_addresses(row, meta), f"{path}:{line.number}")
    return RawRecord(line.number - 1, url, text=text, meta=meta, position=line.position)


def _bad(line: Line, path: str, reason: str) -> Damage:
    # Half a line is no mistake of its writer. It never passes for a whole one: its brackets do not close.
    return Damage(path, line.number, "json.cut" if line.may_be_cut else reason, len(line.data), unit="line")


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
