"""Files of JSON lines that grow while something long runs, and are gone on with after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvalError(f"{path}:{number}: not JSON ({error}); correct the line or delete the file") from None
        if not isinstance(row, dict):
            raise EvalError(f"{path}:{number}: {type(row).__name__} where a JSON object is expected")
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
