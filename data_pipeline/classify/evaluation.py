"""How well scores tell two classes apart, on texts that training did not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

Float64Array = NDArray[np.float64]

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
KEPT_SHARES = (0.5, 0.25, 0.1, 0.05, 0.01)
"""Source: DCLM keeps the best 10 % of a crawl by such a score (Li et al. 2024, section 4.4)."""
_LEAST_PROBABILITY = 1e-7


@dataclass(frozen=True)
class Evaluation:
    """Held-out figures of a classifier."""

    positives: int
    negatives: int
    auc: float
    """Area under the ROC curve: how often a positive text scores above a negative one."""
    accuracy: float
    """At threshold 0.5, both classes weighed equally."""
    log_loss: float
    """Mean negative log likelihood in nats, both classes weighed equally; ln 2 = 0.69 is a guess."""
    at_threshold: tuple[dict[str, float], ...]
    """threshold, precision, recall, kept_negatives; precision as if the classes were equally frequent."""
    to_keep: tuple[dict[str, float], ...]
    """kept (share of the negatives), min_score, recall (of the positives)."""

    def as_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "positives": self.positives,
            "negatives": self.negatives,
            "auc": self.auc,
            "accuracy": self.accuracy,
            "log_loss": self.log_loss,
            "at_threshold": list(self.at_threshold),
            "to_keep": list(self.to_keep),
        }


def evaluate(positive: Float64Array, negative: Float64Array) -> Evaluation:
    """Figures from the scores of held-out texts of both classes; neither may be empty.

    Args:
        positive: (n,) scores of positive texts.
        negative: (m,) scores of negative texts.
    """
    log_loss = (_surprise(positive) + _surprise(1 - negative)) / 2
    accuracy = (float((positive >= 0.5).mean()) + float((negative < 0.5).mean())) / 2
    return Evaluation(
        positives=len(positive),
        negatives=len(negative),
        auc=round(roc_auc(positive, negative), 6),
        accuracy=round(accuracy, 6),
        log_loss=round(log_loss, 6),
        at_threshold=tuple(_at(threshold, positive, negative) for threshold in THRESHOLDS),
        to_keep=tuple(_keeping(share, positive, negative) for share in KEPT_SHARES),
    )


def roc_auc(positive: Float64Array, negative: Float64Array) -> float:
    """The share of pairs in which the positive text scores higher, ties counting half (Mann-Whitney U / nm)."""
    ordered = np.sort(negative)
    below, up_to = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + up_to).mean() / 2 / len(negative))


def tables(evaluation: Evaluation) -> list[Table]:
    """What a user sees: figures at thresholds, and the threshold for a share to keep."""
    figures = Table(
        title=f"held-out: {evaluation.positives} positive, {evaluation.negatives} negative texts; "
        f"AUC {evaluation.auc:.4f}, accuracy {evaluation.accuracy:.4f}, log loss {evaluation.log_loss:.4f}",
        caption="precision as if both classes were equally frequent",
        title_justify="left",
    )
    for column in ("score at least", "precision", "recall", "negatives kept"):
        figures.add_column(column, justify="right")
    for row in evaluation.at_threshold:
        values = (row["precision"], row["recall"], row["kept_negatives"])
        figures.add_row(f"{row['threshold']:g}", *(f"{value:.2%}" for value in values))
    choices = Table(title="to keep a share of texts like the negatives", title_justify="left")
    for column in ("share", "min_score", "positives kept"):
        choices.add_column(column, justify="right")
    for row in evaluation.to_keep:
        choices.add_row(f"{row['kept']:.0%}", f"{row['min_score']:.4f}", f"{row['recall']:.2%}")
    return [figures, choices]


def _surprise(probabilities: Float64Array) -> float:
    return float(-np.log(np.clip(probabilities, _LEAST_PROBABILITY, 1)).mean())


def _at(threshold: float, positive: Float64Array, negative: Float64Array) -> dict[str, float]:
    recall, kept = float((positive >= threshold).mean()), float((negative >= threshold).mean())
    precision = recall / (recall + kept) if recall + kept else 0.0
    values = {"precision": precision, "recall": recall, "kept_negatives": kept}
    return {"threshold": threshold, **{name: round(value, 6) for name, value in values.items()}}


def _keeping(share: float, positive: Float64Array, negative: Float64Array) -> dict[str, float]:
    min_score = float(np.quantile(negative, 1 - share, method="higher"))
    return {"kept": share, "min_score": round(min_score, 6), "recall": round(float((positive >= min_score).mean()), 6)}
