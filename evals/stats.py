"""Intervals, standard errors and paired tests of scores. Numbers in, numbers out; each formula with its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""Quantile of the standard normal distribution at 0.975."""

RESAMPLES = 10_000
BOOTSTRAP_SEED = 0

_MOST_KINDS = 64
"""Of different differences, below which a resample is a draw of how often each occurs, and not of single documents."""
_DRAWS_AT_ONCE = 1 << 22

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of b - a over the same documents."""

    value: float
    ci95: tuple[float, float]
    n: int
    n_clusters: int | None = None
    """Groups that were resampled as wholes; None where documents were."""


def wilson_interval(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Interval of a proportion that keeps its coverage near 0 and 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", equation for p.
    """
    if n == 0:
        raise ValueError("a proportion of no trials has no interval")
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def normal_interval(value: float, stderr: float, z: float = Z95) -> tuple[float, float]:
    """Interval of a mean whose distribution is near enough to a normal one."""
    return value - z * stderr, value + z * stderr


def leaves_out_zero(interval: tuple[float, float]) -> bool:
    """Whether a difference with this interval has a sign."""
    return interval[0] > 0 or interval[1] < 0


def clustered_stderr(scores: Sequence[float] | Floats, clusters: Sequence[Any]) -> float:
    """Standard error of a mean over documents that come in groups, such as MMLU's subjects.

    sqrt(SE^2 + 1/n^2 sum over groups c of sum over i != j in c of (s_i - mean)(s_j - mean)), with SE^2 = s^2 / n, the
    variance of the mean of independent documents. Where documents of a group fail together it is larger than SE, and
    so it says what another choice of groups could have given, not only of documents.

    Source: Miller 2024, "Adding Error Bars to Evals", equations 1 and 4.

    Args:
        scores: (n,) of each document.
        clusters: (n,) the group of each.

    Raises:
        ValueError: fewer than two documents or groups, or lengths that differ.
    """
    values = np.asarray(scores, np.float64)
    n = len(values)
    groups = _numbered(clusters)
    if n < 2 or len(groups) != n or groups.max() == 0:
        raise ValueError(f"{n} scores with {len(groups)} groups: two groups and two documents are needed")
    residuals = values - values.mean()
    sums = np.bincount(groups, residuals)
    between = float(sums @ sums - residuals @ residuals)  # the sum over i != j
    variance = float(residuals @ residuals) / (n - 1) / n + between / n**2
    return math.sqrt(max(0.0, variance))  # groups that balance each other may leave a rounding error below 0


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided p-value: would the documents on which two models differ fall this unevenly if neither were better?

    min(1, 2 P(X <= min(b, c))), X binomial(b + c, 1/2), in whole numbers.

    Source: McNemar 1947; exact form in Fagerland, Lydersen, Laake 2013, "The McNemar test for binary matched-pairs
    data", equation 3.

    Args:
        only_a: documents that only the one has right.
        only_b: documents that only the other has right.
    """
    n, least = only_a + only_b, min(only_a, only_b)
    if least < 0:
        raise ValueError(f"counts of documents must not be negative, got {only_a} and {only_b}")
    term, tail = 1, 1
    for k in range(1, least + 1):
        term = term * (n - k + 1) // k
        tail += term
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    clusters: Sequence[Any] | None = None,
    n_resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> PairedDifference:
    """Mean of b - a and its 95 % percentile interval over resampled documents, or over resampled groups of them.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 13.3 and 8 (groups as units).

    Args:
        a: (n,) scores of one model.
        b: (n,) scores of the other on the same documents in the same order.
        clusters: (n,) group of each document; where given, groups are drawn as wholes.
        n_resamples: draws.
        seed: of the draws.

    Raises:
        ValueError: no documents, or lengths that differ.
    """
    if len(a) != len(b) or not len(a) or (clusters is not None and len(clusters) != len(a)):
        raise ValueError(f"{len(a)} and {len(b)} scores: a paired difference needs the same documents, one at least")
    differences = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    random = np.random.default_rng(seed)
    if clusters is None:
        means, n_clusters = _resampled_means(differences, random, n_resamples), None
    else:
        groups = _numbered(clusters)
        sums, sizes = np.bincount(groups, differences), np.bincount(groups)
        n_clusters = len(sums)
        drawn = random.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=n_resamples)
        means = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, [0.025, 0.975])
    return PairedDifference(float(differences.mean()), (float(low), float(high)), len(differences), n_clusters)


def minimum_detectable_difference(stderr: float, power: float = 0.8, alpha: float = 0.05) -> float:
    """The true difference that a two-sided test at `alpha` would show in the share `power` of such evaluations.

    (z_(1 - alpha/2) + z_power) SE. Source: Miller 2024, "Adding Error Bars to Evals", section 5, solved for delta.

    Args:
        stderr: of the (paired) difference.
        power: share of evaluations.
        alpha: of the test.
    """
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * stderr


def paired_stderr(a: Sequence[float], b: Sequence[float], *, clusters: Sequence[Any] | None = None) -> float:
    """Standard error of the mean of b - a, over independent documents or over groups of them; NaN for one document.

    Source: Miller 2024, "Adding Error Bars to Evals", equation 7; of groups, its equation 4 for these differences.

    Args:
        a: (n,) scores of one model.
        b: (n,) scores of the other on the same documents in the same order.
        clusters: (n,) group of each document, two groups at least; None where documents are independent.
    """
    differences = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    if clusters is not None:
        return clustered_stderr(differences, clusters)
    return float(differences.std(ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.nan


def pass_at_k(n: int, passed: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k completions passes, from n of which `passed` do.

    Source: Chen et al. 2021, "Evaluating large language models trained on code", section 2.1, equation 1:
    1 - C(n - c, k) / C(n, k), as a product.
    """
    if n - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - passed + 1, n + 1))


def bootstrap_interval(values: Floats, seed: int = BOOTSTRAP_SEED) -> tuple[float, float]:
    """95 % percentile interval of the mean, over resamples of the values with a fixed seed.

    Source: Efron and Tibshirani 1993, "An introduction to the bootstrap", section 13.3.
    """
    random = np.random.default_rng(seed)
    means = [random.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are: each may be compared with 0.05 as if it were the only one.

    The k-th smallest of m is multiplied with m - k + 1, and none is below one before it.
    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    corrected = [0.0] * len(p_values)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = least
    return corrected


def _numbered(clusters: Sequence[Any]) -> NDArray[np.int64]:
    """Groups as 0, 1, ... in the order of their first document."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.int64)


def _resampled_means(differences: Floats, random: np.random.Generator, n_resamples: int) -> Floats:
    n = len(differences)
    kinds, counts = np.unique(differences, return_counts=True)
    if len(kinds) <= _MOST_KINDS:
        drawn: Floats = random.multinomial(n, counts / n, size=n_resamples) @ kinds / n
        return drawn
    means = np.empty(n_resamples)
    step = max(1, _DRAWS_AT_ONCE // n)
    for first in range(0, n_resamples, step):
        rows = min(step, n_resamples - first)
        means[first : first + rows] = differences[random.integers(0, n, (rows, n))].mean(axis=1)
    return means
