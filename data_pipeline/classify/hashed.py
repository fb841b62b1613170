"""A linear classifier over hashed features: one weight a bucket, a probability out."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from data_pipeline.classify.features import FeatureSettings, UInt32Array, text_features
from megagpt.errors import DataError

FORMAT = 1
_MAGIC = b"PK\x03\x04"

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class HashedClassifier:
    """Logistic regression: the probability that a text belongs to the positive class.

    The logit is bias + (sum of the weights of the features) / sqrt(number of features): a longer text gives more
    evidence, but not as if its words were drawn independently of each other.
    """

    settings: FeatureSettings
    weights: Float32Array
    """(2^buckets,)."""
    bias: float
    about: dict[str, Any]
    """What it was trained on, and how it did on held-out texts; JSON values."""

    def score(self, text: str) -> float:
        """The probability; for a text without words, that of no evidence."""
        return logistic(self.bias + evidence(text_features(text, self.settings), self.weights))

    def looking_at(self, max_characters: int) -> HashedClassifier:
        """The same model with another part of each text looked at; 0: all of it."""
        return replace(self, settings=replace(self.settings, max_characters=max_characters))

    def save(self, path: Path) -> None:
        """Write one .npz, whose bytes depend on nothing but the model."""
        header = {"format": FORMAT, "settings": asdict(self.settings), "bias": self.bias, "about": self.about}
        with path.open("wb") as file:
            np.savez_compressed(
                file, header=np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8), weights=self.weights
            )

    @classmethod
    def load(cls, path: Path) -> HashedClassifier:
        """The model that `save` wrote; nothing in the file is executed.

        Raises:
            DataError: no such file, damaged, or of another format.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                header = json.loads(arrays["header"].tobytes())
                weights = arrays["weights"]
            settings = FeatureSettings(**header["settings"])
            bias, about = float(header["bias"]), dict(header["about"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: no classifier of `megagpt data train-classifier` or damaged: {error}") from None
        if header.get("format") != FORMAT or weights.shape != (1 << settings.buckets,) or weights.dtype != np.float32:
            raise DataError(f"{path}: classifier of another format ({header.get('format')}); train it again")
        return cls(settings, weights, bias, about)


def is_hashed_classifier(path: Path) -> bool:
    """Whether the file looks like one of ours (and not like fastText's)."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def logistic(logit: float) -> float:
    """1 / (1 + e^-logit)."""
    return float(1 / (1 + np.exp(-logit))) if logit > 0 else float(np.exp(logit) / (1 + np.exp(logit)))


@numba.njit(cache=True, nogil=True)
def evidence(features: UInt32Array, weights: Float32Array) -> float:
    """Sum of the features' weights over the root of their number; 0 for none."""
    total = 0.0
    for feature in features:
        total += weights[feature]
    return total / np.sqrt(len(features)) if len(features) else 0.0
