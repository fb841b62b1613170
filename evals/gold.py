"""What moves before accuracy does: how probable the right answer is, by itself and beside the wrong ones.

A small model answers multiple choice at chance for most of its training, while the probability of the right answer
already rises. Source: Schaeffer et al. 2023, "Are emergent abilities of large language models a mirage?", section 3;
Bhagia et al. 2024, "Establishing task scaling laws via compute-efficient model ladders", section 3.1 (bits per byte of
the right answer as the task's loss).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GoldScores:
    """Means over documents."""

    n: int
    """Documents with one right answer that was scored."""
    bits_per_byte: float
    """Of the right answer's text behind its prompt, its leading space included."""
    margin: float | None
    """Log-probability of the right answer less that of the likeliest wrong one, in nats; None without wrong ones."""
    bits_per_byte_stderr: float | None = None
    """Standard error of the mean; None of a single document, and in files of older versions."""
    margin_stderr: float | None = None


def gold_scores(samples: Sequence[Mapping[str, Any]]) -> GoldScores | None:
    """From the lines of a task's samples file; None where no document has one right answer that was scored.

    Left out are documents that are scored by what all their right answers have together (truthfulqa_mc2: `right` in
    their lines; lm-eval gives each of them the target 0), and tasks whose choices are different prompts (winogrande);
    `n` says how many are in.
    """
    bits, margins = [], []
    for sample in samples:
        gold = _gold(sample)
        if gold is None:
            continue
        logprobs = sample["logprobs"]
        others = [value for index, value in enumerate(logprobs) if index != gold]
        bits.append(-logprobs[gold] / math.log(2) / len(sample["choices"][gold].encode()))
        if others:
            margins.append(logprobs[gold] - max(others))
    if not bits:
        return None
    return GoldScores(
        n=len(bits),
        bits_per_byte=statistics.fmean(bits),
        margin=statistics.fmean(margins) if margins else None,
        bits_per_byte_stderr=_stderr(bits),
        margin_stderr=_stderr(margins),
    )


def _stderr(values: Sequence[float]) -> float | None:
    """Of the mean; not a number where a value is none (a model that diverged), as the mean then is."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    away = [value - mean for value in values]
    return math.sqrt(math.fsum(each * each for each in away) / (len(values) - 1) / len(values))


def _gold(sample: Mapping[str, Any]) -> int | None:
    """Index of the right answer among the scored ones."""
    choices, target = sample.get("choices"), sample["target"]
    if not choices or not all(choices) or "right" in sample:
        return None
    if len(choices) == 1:
        return 0
    known = isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(choices)
    return target if known and len(set(choices)) > 1 else None
