"""Lists of words in files, and one pattern that finds any of many strings.

Format: one entry a line in UTF-8, blank lines and lines that begin with `#` passed over; the lists of LDNOOBW (List of
Dirty, Naughty, Obscene, and Otherwise Bad Words) and of RefinedWeb have it.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megagpt.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"


def read_list_lines(path: Path, setting: str) -> Iterator[bytes]:
    """The lines of a list file, gzip-compressed or not, without their ends.

    Args:
        path: the file.
        setting: the configuration key that named it, for errors.

    Raises:
        DataError: there is no such file, or it is damaged.
    """
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            with gzip.open(raw) if is_gzip else raw as file:
                for line in file:
                    yield line.rstrip(b"\r\n")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; {setting} names it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as a list ({error}); {setting} names it, fetch it again") from None


def read_word_list(path: Path, setting: str) -> list[str]:
    """The entries of a list of words in lower case, in the order of the file, each once.

    Raises:
        DataError: there is no such file, or it is not UTF-8 text.
    """
    entries: dict[str, None] = {}
    for number, line in enumerate(read_list_lines(path, setting), start=1):
        try:
            entry = line.decode().removeprefix("\ufeff").strip().lower()
        except UnicodeDecodeError:
            raise DataError(f"{path}: line {number} is not UTF-8; {setting} names it, convert it to UTF-8") from None
        if entry and not entry.startswith("#"):
            entries[entry] = None
    return list(entries)


def any_of(strings: Iterable[str]) -> str:
    """A pattern that matches any of the strings, of two that begin alike the longer one.

    Common beginnings are written once, which makes a search through hundreds of strings as quick as through a few.
    """
    tree: dict[str, Any] = {}
    for string in strings:
        node = tree
        for character in string:
            node = node.setdefault(character, {})
        node[""] = {}
    return _branches(tree)


def _branches(tree: dict[str, Any]) -> str:
    optional = "" in tree
    parts = []
    for first, below in sorted(tree.items()):
        if not first:
            continue
        text, node = first, below
        while len(node) == 1 and "" not in node:
            ((character, node),) = node.items()
            text += character
        parts.append(re.escape(text) + ("" if set(node) == {""} else _branches(node)))
    if not parts:
        return ""
    return f"(?:{'|'.join(parts)})" + ("?" if optional else "")
