"""A text cut into words and lines once, for all filters to share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

_TOKEN = re.compile(r"\w+(?:['\u2019]\w+)?|[^\w\s]")
_LINE_BREAKS = re.compile(r"\n+")
_PARAGRAPH_BREAKS = re.compile(r"\n{2,}")


@dataclass(frozen=True)
class TextView:
    """A text and what the rules count in it, each worked out when first asked for."""

    text: str

    @cached_property
    def tokens(self) -> list[str]:
        """Words, and every other visible character by itself: "It's 3%" is `It's`, `3`, `%`."""
        return _TOKEN.findall(self.text)

    @cached_property
    def token_counts(self) -> Counter[str]:
        """How often each token occurs."""
        return Counter(self.tokens)

    @cached_property
    def n_words(self) -> int:
        """Tokens that are words."""
        return sum(count for token, count in self.token_counts.items() if is_word(token))

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank."""
        return [line for line in _LINE_BREAKS.split(self.text) if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """Blocks of lines between blank lines."""
        return [block for block in _PARAGRAPH_BREAKS.split(self.text.strip()) if block.strip()]


def is_word(token: str) -> bool:
    """Whether a token holds a letter, digit or underscore, and so is no sign of punctuation."""
    return len(token) > 1 or token.isalnum() or token == "_"


def count_repeats(parts: Iterable[str]) -> tuple[int, int]:
    """How many parts occurred before, and how many characters those repeats have."""
    seen: set[str] = set()
    repeats = characters = 0
    for part in parts:
        if part in seen:
            repeats += 1
            characters += len(part)
        else:
            seen.add(part)
    return repeats, characters
