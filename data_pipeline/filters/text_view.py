"""A text cut into words and lines once, for all filters to share."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

_TOKEN = re.compile(r"\w+(?:['\u2019]\w+)?|[^\w\s]")


@dataclass(frozen=True, slots=True)
class WordCounts:
    """Numbers of words and signs of a text."""

    n_tokens: int
    """Words and other visible characters."""
    n_words: int
    """Tokens that are words: those with a letter, digit or underscore."""
    word_characters: int
    """In all words together."""
    n_spaced: int
    """What white space separates."""
    n_lettered_spaced: int
    """Of these, those with at least one letter."""


@dataclass(frozen=True)
class TextView:
    """A text and what the rules count in it, each worked out when first asked for."""

    text: str

    @cached_property
    def tokens(self) -> list[str]:
        """Words, and every other visible character by itself: "It's 3%" is `It's`, `3`, `%`."""
        return _TOKEN.findall(self.text)

    @cached_property
    def words(self) -> WordCounts:
        """Numbers of words."""
        compiled = _kernels()
        return WordCounts(*compiled.count_words(self._codes, compiled.character_classes()))

    @cached_property
    def pieces(self) -> tuple[int, int]:
        """(words and signs, those with a letter), as a tokenizer for English cuts them.

        A sign of `.,:@` inside a word or number belongs to it (`U.S`, `3.14`, `me@here.org` are one piece each), `it's`
        is two words, and a row of equal signs is one.
        """
        compiled = _kernels()
        n_pieces, n_lettered = compiled.count_pieces(self._codes, compiled.character_classes())
        return n_pieces, n_lettered

    def count_present(self, words: WordSet) -> int:
        """How many of these words occur as tokens, in the same case."""
        found: int = _kernels().count_present(self._codes, self._spans, words.codes, words.spans)
        return found

    @cached_property
    def repeated_ngram_characters(self) -> list[int]:
        """Characters in repeated n-grams of tokens, n = 2 to 10; see `kernels.repeated_characters`."""
        compiled = _kernels()
        starts, ends, _ = self._spans
        numbers = compiled.number_tokens(self._codes, self._spans)
        counts: list[int] = compiled.repeated_characters(numbers, ends - starts)
        return counts

    @cached_property
    def n_sentences(self) -> int:
        """Sentences: each ends where `.`, `?` or `!` and closing quotes come before white space, or with its line."""
        compiled = _kernels()
        found: int = compiled.count_sentences(self._codes, compiled.character_classes())
        return found

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank."""
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Blocks of lines between blank lines."""
        blocks = [block.lstrip("\n") for block in self.text.strip().split("\n\n")]
        return [block for block in blocks if block and not block.isspace()]

    @cached_property
    def _codes(self) -> Any:
        return _kernels().code_points(self.text)

    @cached_property
    def _spans(self) -> Any:
        """Starts, ends and hashes of the tokens."""
        compiled = _kernels()
        return compiled.find_tokens(self._codes, compiled.character_classes(), self.words.n_tokens)


class WordSet:
    """Words to look for among the tokens of texts; what is no single token never occurs."""

    def __init__(self, words: Iterable[str]) -> None:
        single = sorted({word for word in words if _TOKEN.fullmatch(word)})
        view = TextView("\n".join(single))
        starts, ends, hashes = view._spans
        order = hashes.argsort()
        self.codes = view._codes
        """(characters,): the words in one text."""
        self.spans = (starts[order], ends[order], hashes[order])
        """Their starts, ends and hashes, by rising hash."""


@functools.cache
def _kernels() -> ModuleType:
    # Not at the top: a command that only reads a configuration should not wait for numba.
    from data_pipeline.filters import kernels

    return kernels


def count_repeats(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts occurred before, and how many characters those repeats have."""
    different = set(parts)
    if len(different) == len(parts):
        return 0, 0
    return len(parts) - len(different), sum(map(len, parts)) - sum(map(len, different))
