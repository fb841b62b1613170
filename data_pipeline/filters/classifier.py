"""A classifier's score: quality models keep what scores high (`min_score`), toxicity models drop it (`max_score`).

Source: Li et al. 2024, "DataComp-LM", section 4.4 (a linear classifier over hashed n-grams picks the best tenth of a
crawl); Soldaini et al. 2024, "Dolma", content filtering of the web part (fastText models of the Jigsaw comments).

Several classifiers in one job have names of their own: `classifier:quality`, `classifier:toxicity`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.filters.rules import Apply, Finding, Settings
from data_pipeline.filters.text_view import TextView


@dataclass(frozen=True, slots=True)
class Classifier(Settings):
    """Model and thresholds; without thresholds the score is only recorded."""

    model: Path
    """A model of `megagpt data train-classifier` (.npz), or any supervised fastText model (.bin, .ftz)."""
    label: str = ""
    """fastText: the label whose probability is the score, such as hq or __label__toxic."""
    min_score: float | None = None
    max_score: float | None = None
    characters: int | None = None
    """How much of a text is looked at, from its beginning; 0: all; null: as much as in training (fastText: all)."""


def bind_classifier(settings: Classifier) -> Apply:
    """The measuring function; loads the model."""
    from data_pipeline.classify.models import open_classifier

    score = open_classifier(settings.model, settings.label, settings.characters)

    def apply(view: TextView) -> Finding:
        return Finding({"score": score(view.text)})

    return apply
