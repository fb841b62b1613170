"""Guesses of what a model will write next, copied from where the text was the same before.

Where a guess is right, one pass of the model gives several tokens; where it is wrong, the pass gives one as ever. The
tokens are those of decoding one by one as long as a row's numbers do not depend on how its tokens are split over passes
(`megagpt.model.packed.row_invariant`).

Sources: Leviathan et al. 2023, section 2 (checking several tokens in one pass); Saxena 2023, "Prompt lookup decoding".
"""

from __future__ import annotations

from collections.abc import Sequence

SAME = 2
"""Tokens that must have stood there before for those behind them to be guessed."""
GUESSED = 3
"""Tokens of a guess: up to four queries of a row cost what one does (`megagpt.model.packed`). Seven or fifteen, where
guesses had been right, made no batch faster: it waits for its rows that do not repeat themselves."""


class Drafts:
    """One row's text, and guesses behind it."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        """The last `SAME` tokens -> where they were followed by something, the last time."""
        self.guess: list[int] = []
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """The text's next token."""
        n = len(self._tokens)
        if n >= SAME:
            self._behind[tuple(self._tokens[-SAME:])] = n
        self._tokens.append(token)

    def next(self, most: int) -> list[int]:
        """Guess at most so many tokens; none where the last ones did not stand together before."""
        place = self._behind.get(tuple(self._tokens[-SAME:]))
        self.guess = []
        if place is not None:
            n = len(self._tokens)  # a guess that reaches its own beginning goes on with itself
            for at in range(place, place + min(most, GUESSED)):
                self.guess.append(self._tokens[at] if at < n else self.guess[at - n])
        return self.guess
