"""Gopher's quality rules: is it prose of a sensible length at all?

Source: Rae et al. 2021, "Scaling Language Models", appendix A.1.1; the numbers are the same in datatrove's
gopher_quality_filter.py and DCLM's baseline. The paper's shares "of words" are taken over what white space separates,
as dolma and DCLM do; datatrove, and so FineWeb, counts every comma as a word without a letter there, which drops more
pages: `shares_of`. The number of words and their mean length are taken over words without punctuation. Bullets: bullet
point, `-` and `*`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView, WordSet

_BULLETS = frozenset("•-*")
_ELLIPSES = ("...", "…")


@dataclass(frozen=True, slots=True)
class GopherQuality(Settings):
    """Thresholds; shares that a text without words or lines does not have fail no rule."""

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3.0
    max_mean_word_length: float | None = 10.0
    max_hash_per_word: float | None = 0.1
    max_ellipsis_per_word: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    """Share of lines that begin with a bullet."""
    max_ellipsis_lines: float | None = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: float | None = 0.8
    """Share of words with at least one letter."""
    min_stop_words: int | None = 2
    """How many different words of `stop_words` must occur."""
    shares_of: Literal["spaced", "tokens"] = "spaced"
    """What counts as a word in the shares of words: all that white space separates, or every word and every sign of
    punctuation, as in FineWeb."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")


def bind_gopher_quality(settings: GopherQuality) -> Apply:
    """The measuring function."""
    stop_words = WordSet(settings.stop_words)

    def apply(view: TextView) -> Finding:
        words, lines = view.words, view.lines
        n_ellipses = sum(map(view.text.count, _ELLIPSES))
        bullet_lines = sum(line.lstrip()[0] in _BULLETS for line in lines)
        ellipsis_lines = sum(line.rstrip().endswith(_ELLIPSES) for line in lines) if n_ellipses else 0
        n_all, n_lettered = view.pieces if settings.shares_of == "tokens" else (words.n_spaced, words.n_lettered_spaced)
        return Finding(
            {
                "words": words.n_words,
                "mean_word_length": _share(words.word_characters, words.n_words),
                "hash_per_word": _share(view.text.count("#"), n_all),
                "ellipsis_per_word": _share(n_ellipses, n_all),
                "bullet_lines": _share(bullet_lines, len(lines)),
                "ellipsis_lines": _share(ellipsis_lines, len(lines)),
                "alphabetic_words": _share(n_lettered, n_all),
                "stop_words": view.count_present(stop_words),
            }
        )

    return apply


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
