"""`megagpt data train-classifier`: two sets of texts -> a hashed linear classifier with held-out figures.

Features are spooled to a file beside the model and trained on from there, so memory holds the weights and some ten
bytes a text. The result depends on the texts, their order and the settings alone.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import numba
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.classify.evaluation import Evaluation, evaluate, tables
from data_pipeline.classify.examples import read_examples, warnings_of
from data_pipeline.classify.features import FeatureSettings, UInt32Array
from data_pipeline.classify.hashed import Float32Array, HashedClassifier, evidence, logistic
from megagpt.errors import DataError

LEARNING_RATE = 0.5
ADAGRAD_START = 1e-6
"""First value of the sums of squared gradients. Source: Duchi, Hazan, Singer 2011, delta in figure 1."""


@dataclass(frozen=True)
class TrainingRequest:
    """What to train, on what, and how."""

    positive: tuple[str, ...]
    """Files, folders or globs of texts that shall score high: jsonl(.gz/.zst), parquet, txt, or folders of a data job,
    of which the docs.parquet are read."""
    negative: tuple[str, ...]
    out: Path
    validation: float = 0.1
    """Share of the texts that is held out, chosen by a hash of the text: equal texts are on the same side."""
    features: FeatureSettings = field(default_factory=FeatureSettings)
    epochs: int = 3
    l2: float = 1e-6
    """Strength of the pull of a text's weights towards 0."""
    seed: int = 0
    text_key: str = "text"


def train_classifier(request: TrainingRequest, console: Console) -> Evaluation:
    """Read, train, evaluate on held-out texts, save; tables and warnings go to the console.

    Raises:
        DataError: no texts of a class, or none of them held out.
    """
    _check(request)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=request.out.parent) as spool:
        by_class = (request.negative, request.positive)
        examples = read_examples(by_class, request.text_key, request.features, cast(BinaryIO, spool), console)
        spool.flush()
        labels, hashes, offsets = examples.arrays()
        held_out = _held_out(hashes, request)
        _check_classes(labels, held_out, request)
        features = np.memmap(spool, np.uint32, "r")
        weights, bias = _fit(features, offsets, labels, np.flatnonzero(~held_out), request, console)
        scores = _scores(features, offsets, np.flatnonzero(held_out), weights, bias)
    warnings = warnings_of(examples, held_out)
    evaluation = evaluate(scores[labels[held_out] == 1], scores[labels[held_out] == 0])
    about = {
        "positive": int((labels == 1).sum()),
        "negative": int((labels == 0).sum()),
        "training": {name: getattr(request, name) for name in ("validation", "epochs", "l2", "seed")},
        "evaluation": evaluation.as_json(),
        "warnings": warnings,
    }
    HashedClassifier(request.features, weights, bias, about).save(request.out)
    for table in tables(evaluation):
        console.print(table)
    for warning in warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False)
    console.print(f"{request.out}: {request.out.stat().st_size} bytes", markup=False, highlight=False)
    return evaluation


def _check(request: TrainingRequest) -> None:
    if not 0 < request.validation < 1:
        raise DataError(f"validation is {request.validation}; a share between 0 and 1 is held out, such as 0.1")
    if request.features.ngrams < 1 or not 8 <= request.features.buckets <= 28:
        raise DataError(
            f"ngrams is {request.features.ngrams} and buckets {request.features.buckets}; at least 1, and 8 to 28"
        )


def _held_out(hashes: NDArray[np.uint64], request: TrainingRequest) -> NDArray[np.bool_]:
    # The seed takes part through a bijection, so that other seeds hold out other texts.
    mixed = (hashes ^ np.uint64(request.seed)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(11)).astype(np.float64) / (1 << 53) < request.validation


def _check_classes(labels: NDArray[np.uint8], held_out: NDArray[np.bool_], request: TrainingRequest) -> None:
    for label, name, paths in ((1, "positive", request.positive), (0, "negative", request.negative)):
        of_class = labels == label
        if not (of_class & held_out).any() or not (of_class & ~held_out).any():
            raise DataError(
                f"{', '.join(paths)}: {int(of_class.sum())} {name} texts, of which {int((of_class & held_out).sum())} "
                f"held out (validation {request.validation}); both parts need at least one, give more texts"
            )


def _fit(
    features: UInt32Array,
    offsets: NDArray[np.int64],
    labels: NDArray[np.uint8],
    rows: NDArray[np.int64],
    request: TrainingRequest,
    console: Console,
) -> tuple[Float32Array, float]:
    """Weights and bias by Adagrad, one text at a time in an order drawn for each epoch."""
    weights = np.zeros(1 << request.features.buckets, np.float32)
    squares = np.full(len(weights), ADAGRAD_START, np.float32)
    bias = np.array([0.0, ADAGRAD_START])
    positives = int(labels[rows].sum())
    # Each class as a whole weighs the same, and a text 1 on average.
    weight_of = np.array([len(rows) / 2 / (len(rows) - positives), len(rows) / 2 / positives])
    generator = np.random.Generator(np.random.PCG64(request.seed))
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("training", total=request.epochs * len(rows))
        for _ in range(request.epochs):
            order = generator.permutation(rows)
            for part in np.array_split(order, max(1, len(order) // 10_000)):
                _descend(features, offsets, labels, part, weight_of, weights, squares, bias, request.l2)
                progress.advance(bar, len(part))
    return weights, float(bias[0])


@numba.njit(cache=True, nogil=True)
def _descend(  # noqa: PLR0913 - a compiled loop takes arrays and not objects
    features: UInt32Array,
    offsets: NDArray[np.int64],
    labels: NDArray[np.uint8],
    rows: NDArray[np.int64],
    weight_of: NDArray[np.float64],
    weights: Float32Array,
    squares: Float32Array,
    bias: NDArray[np.float64],
    l2: float,
) -> None:
    """One step of Adagrad a text. Source: Duchi, Hazan, Singer 2011, figure 1, with the diagonal of G.

    The pull of l2 acts on the weights of the text's own features, so it costs no pass over all weights.
    """
    for row in rows:
        own = features[offsets[row] : offsets[row + 1]]
        scale = 1.0 / np.sqrt(len(own))
        logit = bias[0]
        for feature in own:
            logit += weights[feature] * scale
        label = labels[row]
        slope = (1.0 / (1.0 + np.exp(-logit)) - label) * weight_of[label]
        bias[1] += slope * slope
        bias[0] -= LEARNING_RATE * slope / np.sqrt(bias[1])
        for feature in own:
            gradient = slope * scale + l2 * weights[feature]
            squares[feature] += gradient * gradient
            weights[feature] -= LEARNING_RATE * gradient / np.sqrt(squares[feature])


def _scores(
    features: UInt32Array, offsets: NDArray[np.int64], rows: NDArray[np.int64], weights: Float32Array, bias: float
) -> NDArray[np.float64]:
    return np.array([logistic(bias + evidence(features[offsets[row] : offsets[row + 1]], weights)) for row in rows])
