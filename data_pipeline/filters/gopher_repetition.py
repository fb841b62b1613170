"""Gopher's repetition rules: does the text say the same thing again and again?

Source: Rae et al. 2021, "Scaling Language Models", appendix A.1.1, table A1; counting as in datatrove's
gopher_repetition_filter.py and DCLM's baseline, with one deviation: the most frequent n-gram must occur at least twice to
count as a repetition. Without that, every short text without any repetition would be dropped, because a single pair of its
words holds a fifth of its characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_pipeline.filters.text_view import TextView, count_repeats


@dataclass(frozen=True, slots=True)
class GopherRepetition:
    """Largest shares that still pass."""

    max_duplicate_lines: float = 0.30
    max_duplicate_paragraphs: float = 0.30
    max_duplicate_line_characters: float = 0.20
    max_duplicate_paragraph_characters: float = 0.20
    max_top_2_gram: float = 0.20
    """Share of the characters in all occurrences of the most frequent pair of tokens."""
    max_top_3_gram: float = 0.18
    max_top_4_gram: float = 0.16
    max_duplicate_5_grams: float = 0.15
    """Share of the characters in runs of five tokens that occurred before; no character counts twice."""
    max_duplicate_6_grams: float = 0.14
    max_duplicate_7_grams: float = 0.13
    max_duplicate_8_grams: float = 0.12
    max_duplicate_9_grams: float = 0.11
    max_duplicate_10_grams: float = 0.10


def gopher_repetition(view: TextView, limits: GopherRepetition) -> Iterator[str]:
    """Names of the rules that the text fails."""
    size = len(view.text)
    if not view.tokens:
        return  # an empty text repeats nothing
    for unit, parts, max_count, max_characters in (
        ("lines", view.lines, limits.max_duplicate_lines, limits.max_duplicate_line_characters),
        (
            "paragraphs",
            view.paragraphs,
            limits.max_duplicate_paragraphs,
            limits.max_duplicate_paragraph_characters,
        ),
    ):
        repeats, characters = count_repeats(parts)
        if repeats / len(parts) > max_count:
            yield f"duplicate_{unit}"
        if characters / size > max_characters:
            yield f"duplicate_{unit.removesuffix('s')}_characters"
    yield from _top_ngram_rules(view.tokens, size, limits)
    yield from _duplicate_ngram_rules(view.tokens, size, limits)


def _top_ngram_rules(tokens: Sequence[str], size: int, limits: GopherRepetition) -> Iterator[str]:
    for n, most in ((2, limits.max_top_2_gram), (3, limits.max_top_3_gram), (4, limits.max_top_4_gram)):
        if top_ngram_characters(tokens, n) / size > most:
            yield f"top_{n}_gram"


def _duplicate_ngram_rules(tokens: Sequence[str], size: int, limits: GopherRepetition) -> Iterator[str]:
    for n, most in (
        (5, limits.max_duplicate_5_grams),
        (6, limits.max_duplicate_6_grams),
        (7, limits.max_duplicate_7_grams),
        (8, limits.max_duplicate_8_grams),
        (9, limits.max_duplicate_9_grams),
        (10, limits.max_duplicate_10_grams),
    ):
        characters = duplicate_ngram_characters(tokens, n)
        if not characters:
            return  # where no n tokens repeat, no n + 1 tokens can
        if characters / size > most:
            yield f"duplicate_{n}_grams"


def top_ngram_characters(tokens: Sequence[str], n: int) -> int:
    """Characters in all occurrences of the n-gram that occurs most often, with one space between its tokens.

    Of equally frequent ones the longest counts; 0 where none occurs twice.
    """
    counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0
    longest = max(sum(map(len, ngram)) for ngram, count in counts.items() if count == most)
    return most * (longest + n - 1)


def duplicate_ngram_characters(tokens: Sequence[str], n: int) -> int:
    """Characters of the tokens that lie in an n-gram seen before, from left to right and without overlap."""
    ngrams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    if len(set(ngrams)) == len(ngrams):
        return 0
    seen: set[tuple[str, ...]] = set()
    characters = at = 0
    while at < len(ngrams):
        if ngrams[at] in seen:
            characters += sum(map(len, ngrams[at]))
            at += n
        else:
            seen.add(ngrams[at])
            at += 1
    return characters
