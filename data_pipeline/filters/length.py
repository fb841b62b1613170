"""Length of a document in characters and words.

Source: Wenzek et al. 2020, "CCNet", and `mine.py` of facebookresearch/cc_net: documents of fewer than 300 characters
go.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView


@dataclass(frozen=True, slots=True)
class Length(Settings):
    """Thresholds."""

    min_characters: int | None = 300
    max_characters: int | None = None
    min_words: int | None = None
    """What white space separates."""
    max_words: int | None = None


def bind_length(settings: Length) -> Apply:
    """The measuring function."""
    del settings  # thresholds only

    def apply(view: TextView) -> Finding:
        return Finding({"characters": len(view.text), "words": len(view.text.split())})

    return apply
