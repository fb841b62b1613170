"""Opening a classifier by its file: ours (.npz) or fastText's (.bin, .ftz)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fasttext

from data_pipeline.classify.hashed import HashedClassifier, is_hashed_classifier
from megagpt.errors import DataError

_PREFIX = "__label__"
_ALL = -1
_LISTED = 8

Score = Callable[[str], float]


def open_classifier(path: Path, label: str, max_characters: int | None) -> Score:
    """A function text -> probability.

    Args:
        path: of the model.
        label: fastText: the label whose probability is wanted, with or without `__label__`. Ours has one class only,
            and wants none.
        max_characters: how much of a text is looked at, from its beginning; 0: all of it; None: as much as in training
            (fastText: all).

    Raises:
        DataError: no model there, or the label does not fit it.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no classifier there; `megagpt data train-classifier` makes one, or name a fastText model"
        )
    if is_hashed_classifier(path):
        model = HashedClassifier.load(path)
        if label:
            raise DataError(f"{path}: a classifier of megagpt has no labels, but label is {label!r}; leave it out")
        return model.score if max_characters is None else model.looking_at(max_characters).score
    return _open_fasttext(path, label.removeprefix(_PREFIX), max_characters or None).score


@dataclass(frozen=True)
class _FastText:
    model: Any
    label: str
    end: int | None

    def score(self, text: str) -> float:
        # The model reads one line; a space in place of a line's end keeps the words apart.
        line = text[: self.end].replace("\n", " ")
        labels, scores = self.model.predict(line, k=_ALL, threshold=0.0)
        found = dict(zip(labels, scores, strict=True))
        # Rounding in the model can give 1.00003; labels of no probability are left out.
        return min(1.0, float(found.get(self.label, 0.0)))


def _open_fasttext(path: Path, label: str, end: int | None) -> _FastText:
    try:
        model = fasttext.load_model(str(path))
        # The end of a line is a word to the model: of an empty text it names every label.
        labels = sorted(name.removeprefix(_PREFIX) for name in model.predict("", k=_ALL, threshold=-1.0)[0])
    except (ValueError, RuntimeError, MemoryError) as error:
        raise DataError(f"{path}: neither a classifier of megagpt nor a fastText model: {error}") from None
    if label not in labels:
        listed = ", ".join(labels[:_LISTED]) + (f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else "")
        raise DataError(f"{path}: label is {label!r}, but the labels of this fastText model are {listed}")
    return _FastText(model, _PREFIX + label, end)
