"""Benchmark items as files: one JSON object a line with `task`, `id`, and `text` or `texts`.

Of a file without `task` and `id`, the file's name and the line's number serve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.document import Damage
from data_pipeline.sources.files import open_file
from data_pipeline.sources.line_reader import read_lines
from megagpt.errors import DataError

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, slots=True)
class Item:
    """One benchmark item."""

    task: str
    id: int | str
    """What the evaluation calls it: of lm-eval's tasks the document's number."""
    texts: tuple[str, ...]
    """What must not stand in a document: the question with its answer, the question by itself ..."""


def item_files(paths: Sequence[Path]) -> list[Path]:
    """The files that files and folders stand for, in the order given; of a folder, all below it by name.

    Raises:
        DataError: nothing is there, or a folder holds no items.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(_ENDINGS))
            if not inside:
                raise DataError(f"{path}: no benchmark items in this folder; files end in {', '.join(_ENDINGS)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(
                f"{path}: no benchmark items there (decontamination.items); `megagpt eval items` writes such a file"
            )
    return list(dict.fromkeys(found))


def read_items(file: Path) -> Iterator[Item]:
    """The items of one file in order.

    Raises:
        DataError: a line is no item, or the file is damaged; with the file and the line.
    """
    with open_file(str(file)) as opened:
        for line in read_lines(opened, str(file)):
            if isinstance(line, Damage):
                raise DataError(
                    f"{file}: damaged at {line.unit} {line.offset}: {line.reason}; benchmark items must be whole"
                )
            if line.data.strip():
                yield _item(line.data, file, line.number)


def _item(data: bytes, file: Path, number: int) -> Item:
    try:
        row = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{file}:{number}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{file}:{number}: {type(row).__name__} instead of an object with `text`")
    texts = row.get("texts", [row["text"]] if "text" in row else None)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{file}:{number}: an item has `text`, a string, or `texts`, a list of strings; keys are {', '.join(row)}"
        )
    task = row.get("task", file.name.split(".")[0])
    if not isinstance(task, str) or not task:
        raise DataError(f"{file}:{number}: `task` is {task!r} and must be a name")
    return Item(task, _id(row.get("id", number), file, number), tuple(texts))


def _id(value: Any, file: Path, number: int) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{file}:{number}: `id` is {value!r} and must be a number or a string")
    return value
