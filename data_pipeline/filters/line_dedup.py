"""Lines that a document says again: the first stays, the others go.

Two lines are the same if they are equal in lower case, without punctuation and with every digit as 0, so that `Page 3`
repeats `Page 2`. Source: Wenzek et al. 2020, "CCNet", section 3.1, whose normalisation this is; CCNet compares with the
lines of all documents, which the dedup stage does (`dedup.units`), this filter with those of the same document.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView

_DIGIT = re.compile(r"\d")
_SIGNS = re.compile(r"[^\w\s]+|_+")


@dataclass(frozen=True, slots=True)
class LineDedup(Settings):
    """What counts as a repeated line."""

    counts: ClassVar[tuple[str, ...]] = ("removed_lines", "removed_characters")

    max_repeated_lines: float | None = None
    """Share of the lines that are not blank."""
    words: int = 1
    """Lines of fewer words are left alone."""


def bind_line_dedup(settings: LineDedup) -> Apply:
    """The cleaning function; line breaks around a line that goes are those of a paragraph at most."""

    def apply(view: TextView) -> Finding:
        lines = view.text.split("\n")
        repeated = repeated_lines(lines, settings.words)
        n_lines = sum(bool(line) and not line.isspace() for line in lines)
        share = len(repeated) / n_lines if n_lines else 0.0
        text = without_lines(lines, repeated) if repeated else view.text
        measures = {
            "repeated_lines": share,
            "removed_lines": len(repeated),
            "removed_characters": len(view.text) - len(text),
        }
        return Finding(measures, text if repeated else None)

    return apply


def normalise_line(line: str) -> str:
    """A line as it is compared: lower case, digits as 0, punctuation away, one space between words."""
    return " ".join(_fold(line).split())


def _fold(text: str) -> str:
    return _SIGNS.sub("", _DIGIT.sub("0", text.lower()))


def repeated_lines(lines: Iterable[str], n_words: int = 1) -> set[int]:
    """Positions of the lines that say what an earlier one said; lines of fewer than `n_words` words never do."""
    seen: set[str] = set()
    repeated: set[int] = set()
    # Folded all at once, which keeps the line breaks and costs half.
    for position, line in enumerate(_fold("\n".join(lines)).split("\n")):
        key = " ".join(line.split())
        if not key or (n_words > 1 and key.count(" ") + 1 < n_words):
            continue
        if key in seen:
            repeated.add(position)
        seen.add(key)
    return repeated


def without_lines(lines: list[str], positions: set[int]) -> str:
    """The text without some lines; a blank line that would follow another one for that reason goes as well."""
    kept: list[str] = []
    has_cut = False
    for position, line in enumerate(lines):
        if position in positions:
            has_cut = True
            continue
        is_blank = not line or line.isspace()
        if is_blank and has_cut and (not kept or not kept[-1].strip()):
            continue
        has_cut = has_cut and is_blank
        kept.append(line)
    return "\n".join(kept)
