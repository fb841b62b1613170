"""Gopher's quality rules: is it prose of a sensible length at all?

Source: Rae et al. 2021, "Scaling Language Models", appendix A.1.1; the numbers are the same in datatrove's
gopher_quality_filter.py and DCLM's baseline. The paper's shares "of words" are taken over what white space separates,
as dolma does (datatrove counts every comma as a word without a letter there, which drops many good pages); the number
of words and their mean length are taken over words without punctuation. Bullets: bullet point, `-` and `*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.filters.text_view import TextView, is_word

_BULLETS = ("•", "-", "*")
_ELLIPSES = ("...", "…")


@dataclass(frozen=True, slots=True)
class GopherQuality:
    """Thresholds; a document that keeps to all of them stays."""

    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    max_mean_word_length: float = 10.0
    max_hash_per_word: float = 0.1
    max_ellipsis_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2
    """How many different words of `stop_words` must occur."""
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")


def gopher_quality(view: TextView, limits: GopherQuality) -> Iterator[str]:
    """Names of the rules that the text fails."""
    if not limits.min_words <= view.n_words <= limits.max_words:
        yield "too_few_words" if view.n_words < limits.min_words else "too_many_words"
    yield from _word_rules(view, limits)
    yield from _line_rules(view, limits)
    if sum(word in view.token_counts for word in set(limits.stop_words)) < limits.min_stop_words:
        yield "too_few_stop_words"


def _word_rules(view: TextView, limits: GopherQuality) -> Iterator[str]:
    spaced = view.text.split()
    if not spaced:
        return  # no shares of nothing; the empty text fails by its number of words
    if view.n_words:
        lengths = sum(len(token) * count for token, count in view.token_counts.items() if is_word(token))
        mean_length = lengths / view.n_words
        if mean_length < limits.min_mean_word_length:
            yield "words_too_short"
        if mean_length > limits.max_mean_word_length:
            yield "words_too_long"
    if view.text.count("#") / len(spaced) > limits.max_hash_per_word:
        yield "too_many_hashes"
    if sum(view.text.count(sign) for sign in _ELLIPSES) / len(spaced) > limits.max_ellipsis_per_word:
        yield "too_many_ellipses"
    alphabetic = sum(word.isalpha() or any(map(str.isalpha, word)) for word in spaced)
    if alphabetic / len(spaced) < limits.min_alphabetic_words:
        yield "too_few_alphabetic_words"


def _line_rules(view: TextView, limits: GopherQuality) -> Iterator[str]:
    n_lines = len(view.lines)
    if not n_lines:
        return
    if sum(line.lstrip().startswith(_BULLETS) for line in view.lines) / n_lines > limits.max_bullet_lines:
        yield "too_many_bullet_lines"
    if sum(line.rstrip().endswith(_ELLIPSES) for line in view.lines) / n_lines > limits.max_ellipsis_lines:
        yield "too_many_ellipsis_lines"
