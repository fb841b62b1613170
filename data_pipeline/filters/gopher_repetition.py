"""Gopher's repetition rules: does the text say the same thing again and again?

Source: Rae et al. 2021, "Scaling Language Models", appendix A.1.1, table A1; counting as in datatrove's
gopher_repetition_filter.py and DCLM's baseline, with one deviation: the most frequent n-gram must occur at least
twice to count as a repetition. Without that, every short text without any repetition would be dropped, because a single
pair of its words holds a fifth of its characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from data_pipeline.filters.text_view import TextView, count_repeats

Ngram = tuple[str, ...]


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
    yield from _ngram_rules(view.tokens, size, limits)


def _ngram_rules(tokens: Sequence[str], size: int, limits: GopherRepetition) -> Iterator[str]:
    most_of_top = {2: limits.max_top_2_gram, 3: limits.max_top_3_gram, 4: limits.max_top_4_gram}
    most_of_duplicates = {
        5: limits.max_duplicate_5_grams,
        6: limits.max_duplicate_6_grams,
        7: limits.max_duplicate_7_grams,
        8: limits.max_duplicate_8_grams,
        9: limits.max_duplicate_9_grams,
        10: limits.max_duplicate_10_grams,
    }
    positions: Sequence[int] = range(len(tokens) - 1)
    for n in (*most_of_top, *most_of_duplicates):
        repeated = repeated_ngrams(tokens, n, positions)
        if not repeated:
            return
        if n in most_of_top:
            if top_ngram_characters(repeated, n) / size > most_of_top[n]:
                yield f"top_{n}_gram"
        elif duplicate_ngram_characters(repeated, n) / size > most_of_duplicates[n]:
            yield f"duplicate_{n}_grams"
        # n + 1 tokens repeat only where their first n and their last n do.
        positions = [at for at in repeated if at + 1 in repeated]


def repeated_ngrams(tokens: Sequence[str], n: int, positions: Iterable[int]) -> dict[int, Ngram]:
    """Of the n-grams that begin at `positions`, in rising order, those that occur there more than once."""
    ngrams = {at: tuple(tokens[at : at + n]) for at in positions}
    counts = Counter(ngrams.values())
    return {at: ngram for at, ngram in ngrams.items() if counts[ngram] > 1}


def top_ngram_characters(repeated: Mapping[int, Ngram], n: int) -> int:
    """Characters in all occurrences of the n-gram that occurs most often, with one space between its tokens.

    Of equally frequent ones the longest counts.
    """
    counts = Counter(repeated.values())
    most = max(counts.values())
    longest = max(sum(map(len, ngram)) for ngram, count in counts.items() if count == most)
    return most * (longest + n - 1)


def duplicate_ngram_characters(repeated: Mapping[int, Ngram], n: int) -> int:
    """Characters of the tokens that lie in an n-gram seen before, from left to right and without overlap."""
    seen: set[Ngram] = set()
    characters = free = 0
    for at, ngram in repeated.items():
        if at < free:
            continue
        if ngram in seen:
            characters += sum(map(len, ngram))
            free = at + n
        else:
            seen.add(ngram)
    return characters
