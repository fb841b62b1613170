"""Histograms of lengths in powers of two, as records keep them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping


def size_class(length: int) -> str:
    """The smallest power of two that is at least `length`: 1, 2, 4 ..."""
    return str(1 << max(length - 1, 0).bit_length())


def size_classes(lengths: Iterable[int]) -> Counter[str]:
    """How many lengths fall into each class."""
    return Counter(map(size_class, lengths))


def in_order(histogram: Mapping[str, int]) -> dict[str, int]:
    """The same, smallest class first."""
    return dict(sorted(histogram.items(), key=lambda item: int(item[0])))
