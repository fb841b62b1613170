"""FineWeb's own rules, which catch lists and menus that passed the others.

Source: Penedo et al. 2024, "The FineWeb Datasets", section 3.5, and datatrove's fineweb_quality_filter.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.filters.text_view import TextView, count_repeats

TERMINAL_PUNCTUATION = (
    *".!?)\"'",
    *"\u2026\u201d\u2019\u00bb",  # ellipsis, closing quotes
    *"\u3002\uff0e\uff01\uff1f",  # Chinese and Japanese
    *"\u061f\u06d4\u0964\u0589",  # Arabic question mark, Urdu, Devanagari, Armenian full stops
)
"""Signs that a line of prose ends with, in the scripts that the language model tells apart most often."""


@dataclass(frozen=True, slots=True)
class FineWeb:
    """Thresholds."""

    min_punctuated_lines: float = 0.12
    """Share of lines that end with terminal punctuation."""
    max_short_lines: float = 0.67
    short_line_characters: int = 30
    """A line of at most so many characters is short."""
    max_duplicate_line_characters: float = 0.01
    max_newlines_per_word: float = 0.3


def fineweb(view: TextView, limits: FineWeb) -> Iterator[str]:
    """Names of the rules that the text fails."""
    n_lines = len(view.lines)
    if not n_lines or not view.tokens:
        yield "empty"
        return
    punctuated = sum(line.rstrip().endswith(TERMINAL_PUNCTUATION) for line in view.lines)
    if punctuated / n_lines < limits.min_punctuated_lines:
        yield "too_few_punctuated_lines"
    short = sum(len(line) <= limits.short_line_characters for line in view.lines)
    if short / n_lines > limits.max_short_lines:
        yield "too_many_short_lines"
    _, duplicate_characters = count_repeats(view.lines)
    if duplicate_characters / sum(map(len, view.lines)) > limits.max_duplicate_line_characters:
        yield "duplicate_line_characters"
    if view.text.count("\n") / len(view.tokens) > limits.max_newlines_per_word:
        yield "too_many_newlines"
