"""Gopher's repetition rules: does the text say the same thing again and again?

Source: Rae et al. 2021, "Scaling Language Models", appendix A.1.1, table A1; counting as in datatrove's
gopher_repetition_filter.py and DCLM's baseline, with one deviation: the most frequent n-gram must occur at least
twice to count as a repetition. Without that, every short text without any repetition would be dropped, because a single
pair of its words holds a fifth of its characters.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView, count_repeats


@dataclass(frozen=True, slots=True)
class GopherRepetition(Settings):
    """Largest shares that still pass; a text without words repeats nothing."""

    max_duplicate_lines: float | None = 0.30
    max_duplicate_paragraphs: float | None = 0.30
    max_duplicate_line_characters: float | None = 0.20
    max_duplicate_paragraph_characters: float | None = 0.20
    max_top_2_gram: float | None = 0.20
    """Share of the characters in all occurrences of the most frequent pair of tokens."""
    max_top_3_gram: float | None = 0.18
    max_top_4_gram: float | None = 0.16
    max_duplicate_5_grams: float | None = 0.15
    """Share of the characters in runs of five tokens that occurred before; no character counts twice."""
    max_duplicate_6_grams: float | None = 0.14
    max_duplicate_7_grams: float | None = 0.13
    max_duplicate_8_grams: float | None = 0.12
    max_duplicate_9_grams: float | None = 0.11
    max_duplicate_10_grams: float | None = 0.10


_NGRAM_MEASURES = (*(f"top_{n}_gram" for n in (2, 3, 4)), *(f"duplicate_{n}_grams" for n in range(5, 11)))


def bind_gopher_repetition(settings: GopherRepetition) -> Apply:
    """The measuring function; it has no parameters."""
    del settings
    return measure_repetition


def measure_repetition(view: TextView) -> Finding:
    """All shares of a text."""
    size = max(len(view.text), 1)
    line_repeats, line_characters = count_repeats(view.lines)
    ngrams = view.repeated_ngram_characters
    paragraph_repeats, paragraph_characters = count_repeats(view.paragraphs)
    return Finding(
        {
            "duplicate_lines": line_repeats / max(len(view.lines), 1),
            "duplicate_paragraphs": paragraph_repeats / max(len(view.paragraphs), 1),
            "duplicate_line_characters": line_characters / size,
            "duplicate_paragraph_characters": paragraph_characters / size,
            **{name: count / size for name, count in zip(_NGRAM_MEASURES, ngrams, strict=True)},
        }
    )
