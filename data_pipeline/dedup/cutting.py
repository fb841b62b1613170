r"""Taking passages out of a text so that what is left reads as if they had never been there.

Where something was cut, one separator stays, the strongest that stood there: a blank line, a line break, or else one
space. So a whole line goes with its break, a cut inside a line leaves one space, and no two blank lines come together.
What follows a line break keeps its indentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_INDENTATION = re.compile(r"[^\S\n]*")


def cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text without the characters in spans; nothing outside of them and of the white space beside them changes.

    Args:
        text: of a document.
        spans: (start, end) in rising order, not overlapping.
    """
    kept: list[str] = []
    position = last = 0
    for start, end in [*spans, (len(text), len(text))]:
        piece = text[position:start]
        visible = piece.strip()
        if visible:
            at = position + len(piece) - len(piece.lstrip())
            kept += [_separator(text, last, at, is_first=not kept) if position else text[:at], visible]
            last = at + len(visible)
        position, before_end = end, position
    if last > before_end:
        return "".join(kept) + text[last:]
    rest = text[before_end:]
    return "".join(kept) + (rest if kept and "\n" in rest else "")


def _separator(text: str, last: int, at: int, *, is_first: bool) -> str:
    """What comes between text[:last] and text[at:], in place of text[last:at]."""
    gap = text[last:at]
    line = last + gap.rfind("\n") + 1
    indentation = _INDENTATION.match(text, line, at)
    indent = indentation.group() if indentation is not None else ""
    if is_first:
        return indent
    if _BLANK_LINE.search(gap):
        return "\n\n" + indent
    return "\n" + indent if "\n" in gap else " "
