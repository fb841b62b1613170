"""RefinedWeb's line rules as DCLM-Baseline has them: drop lines that belong to the page and not to its text.

A line goes if most of it is in capitals, if it is a number, a counter (`3 likes`) or a single word; buttons and notes
such as `Read more...` are cut out of short lines. A page that loses more than a twentieth of its words goes as a whole.

Source: Penedo et al. 2023, "The RefinedWeb Dataset", appendix G.2; Li et al. 2024 (DCLM), appendix on RefinedWeb's
heuristics, and its dclm_baseline_refinedweb.yaml. Deviations: the dots of `Read more...` are dots (there they stand for
any character); addresses inside of the text stay, which DCLM cuts out; words are those of `TextView.tokens`.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import ClassVar

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView

_COUNTED = "likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes|downloads|views|followers"
_COUNTER = re.compile(rf"\W*\d[\d.,]*[kmb]?\s+(?:{_COUNTED})\W*", re.IGNORECASE)
_PHRASES = tuple(
    re.compile(pattern, re.IGNORECASE) for pattern in (r"\s?items in cart", r"\s?read more\.\.\.$", r"^sign-in\s?")
)
_CAPITALS = string.ascii_uppercase.encode()


@dataclass(frozen=True, slots=True)
class DCLM(Settings):
    """Which lines go, and how many words may go with them."""

    counts: ClassVar[tuple[str, ...]] = ("removed_lines",)

    max_removed_words: float | None = 0.05
    """Share of the page's words that went with its lines and phrases; 1 for a page without words."""
    uppercase_characters: float = 0.5
    """A line with a greater share of capitals goes."""
    words_per_line: int = 2
    """A line of fewer words goes; empty lines stay."""
    phrase_line_words: int = 10
    """Phrases are cut out of lines of at most so many words."""


def bind_dclm(settings: DCLM) -> Apply:
    """The measuring function, which leaves the lines that stay."""

    def apply(view: TextView) -> Finding:
        raw = view.text.strip().split("\n")
        kept = [kept for line in raw if (kept := clean_line(line, settings)) is not None]
        cleaned = "\n".join(kept).strip()
        before, after = view.words.n_words, TextView(cleaned).words.n_words
        removed = (before - after) / before if before else 1.0
        return Finding({"removed_words": removed, "removed_lines": len(raw) - len(kept)}, cleaned)

    return apply


def clean_line(line: str, settings: DCLM) -> str | None:
    """The line without the phrases, or None where it goes as a whole."""
    if not line:
        return line
    n_words = len(line.split())
    if n_words < settings.words_per_line or _count_capitals(line) / len(line) > settings.uppercase_characters:
        return None
    if line.isdigit() or _COUNTER.fullmatch(line):
        return None
    return _cut_phrases(line) if n_words <= settings.phrase_line_words else line


def _cut_phrases(line: str) -> str | None:
    for phrase in _PHRASES:
        cut = phrase.sub("", line)
        if line and not cut.strip():
            return None
        line = cut
    return line


def _count_capitals(line: str) -> int:
    if line.isascii():
        return len(line) - len(line.encode().translate(None, _CAPITALS))
    return sum(map(str.isupper, line))
