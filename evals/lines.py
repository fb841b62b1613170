"""Files of JSON lines that grow while something long runs, and are gone on with after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megagpt.atomic import flush_to_disk
from megagpt.errors import EvalError


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; an absent file has none. What a killed process began to write and did not end is left out.

    Raises:
        EvalError: a whole line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EvalError(f"{path}: cannot be read: {error.strerror}") from None
    return _rows(path, content.split(b"\n")[:-1], "correct the line or delete the file")


def read_whole_file(path: Path, fix: str) -> list[dict[str, Any]]:
    """All lines of a file that was written at once: the last one counts, ended or not.

    Args:
        path: jsonl.
        fix: what the user can do about a damaged file.

    Raises:
        EvalError: it is absent, or a line is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    return _rows(path, content.split(b"\n"), fix)


def _rows(path: Path, lines: Iterable[bytes], fix: str) -> list[dict[str, Any]]:
    """Of bytes: a text may hold Unicode's own line separators."""
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvalError(f"{path}:{number}: not valid JSON ({error}); {fix}") from None
        if not isinstance(row, dict):
            raise EvalError(f"{path}:{number}: {type(row).__name__} where a JSON object is expected; {fix}")
        rows.append(row)
    return rows


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line that survives what comes after; an unfinished one before it is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, 2)
        start = max(0, end - 1)
        file.seek(start)
        if end and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        flush_to_disk(file)
