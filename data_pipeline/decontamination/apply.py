"""What becomes of a document that shares passages with benchmark items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_pipeline.decontamination.match import Hit, Index

Action = Literal["drop", "excise", "report"]

LEAST_PIECE_CHARACTERS = 200
"""What is left between two cuts goes as well where it is shorter. Source: Brown et al. 2020, appendix C."""
MOST_PIECES = 10
"""A document that falls into more pieces is contaminated as a whole. Source: Brown et al. 2020, appendix C."""
PIECES_JOINED_BY = "\n\n"

_LONGEST_WORD = 100
"""Characters in which white space is looked for: scripts without spaces are cut where the margin ends."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is left of a document."""

    text: str | None
    """None: the document goes, for `reason`."""
    reason: str
    """decontamination.overlap (action drop), decontamination.pieces or decontamination.too_short (excise); empty where
    the document stays."""
    hits: tuple[Hit, ...]
    """Passages of the text as it was."""
    items: tuple[tuple[int, int], ...]
    """(item, number of its different n-grams in the text), by item: rows of contamination.parquet."""
    characters_cut: int = 0
    """excise: how much shorter the text is."""


def decontaminate(text: str, index: Index, action: Action, excise_characters: int) -> Outcome:
    """Find the passages that benchmark items share with the text, and do what the job says.

    Args:
        text: of one document.
        index: of the benchmarks.
        action: `drop` the document, `excise` the passages, or only `report` them.
        excise_characters: excise: so many characters on each side go with a passage, and the word that ends there.
    """
    hits = index.find(text)
    if not hits:
        return Outcome(text, "", (), ())
    items = tuple(index.count(hits))
    if action == "report":
        return Outcome(text, "", tuple(hits), items)
    if action == "drop":
        return Outcome(None, "decontamination.overlap", tuple(hits), items)
    pieces = [piece for piece in _pieces(text, hits, excise_characters) if piece.strip()]
    if len(pieces) > MOST_PIECES:
        return Outcome(None, "decontamination.pieces", tuple(hits), items)
    left = [piece for piece in pieces if len(piece) >= LEAST_PIECE_CHARACTERS]
    if not left:
        return Outcome(None, "decontamination.too_short", tuple(hits), items)
    cleaned = PIECES_JOINED_BY.join(left)
    return Outcome(cleaned, "", tuple(hits), items, len(text) - len(cleaned))


def _pieces(text: str, hits: list[Hit], margin: int) -> list[str]:
    """What stands before, between and after the cuts, without white space at its ends."""
    pieces = []
    position = 0
    for hit in hits:
        start = _back_to_space(text, max(hit.start - margin, position), position)
        if start > position:
            pieces.append(text[position:start].strip())
        position = max(position, _on_to_space(text, min(hit.end + margin, len(text))))
    pieces.append(text[position:].strip())
    return pieces


def _back_to_space(text: str, start: int, least: int) -> int:
    """The beginning of the word in whose middle `start` lies; `least` where that comes first."""
    for place in range(start, max(least, start - _LONGEST_WORD) - 1, -1):
        if place == least or text[place - 1].isspace():
            return place
    return start


def _on_to_space(text: str, end: int) -> int:
    for place in range(end, min(len(text), end + _LONGEST_WORD) + 1):
        if place == len(text) or text[place].isspace():
            return place
    return end
