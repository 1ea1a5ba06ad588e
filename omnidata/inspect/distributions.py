"""Distributions: quantiles and a histogram of a quantity over samples or images, from a numpy array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_BINS = 16  # at most, in a histogram


@dataclass(frozen=True, slots=True)
class Bin:
    """A bar of a histogram: ``count`` values in [first, last], or [first, last) for shares."""

    first: float
    last: float
    count: int


@dataclass(frozen=True, slots=True)
class Distribution:
    """A quantity over samples (or over images): nearest-rank quantiles and a histogram; all 0 if empty."""

    min: float
    median: float
    mean: float
    p95: float
    max: float
    histogram: tuple[Bin, ...]


def count_distribution(values: np.ndarray) -> Distribution:
    """Of non-negative integers; bins of equal, round width, from the smallest value's to the largest's.

    Example: 20, 21, 60 -> [20, 24] 2, [25, 29] 0, … [60, 64] 1.
    """
    if len(values) == 0:
        return Distribution(0, 0, 0, 0, 0, histogram=())
    low, high = int(values.min()), int(values.max())
    counts = np.bincount(values - low)  # exact quantiles by counting: no sort of a million values
    ends = counts.cumsum()
    median, p95 = (
        low + int(np.searchsorted(ends, round(q * (len(values) - 1)), "right")) for q in (0.5, 0.95)
    )
    width = round_width(high - low + 1)
    first = low // width
    bars = np.bincount(np.arange(low, high + 1) // width - first, weights=counts)
    bins = tuple(Bin(i * width, (i + 1) * width - 1, int(count)) for i, count in enumerate(bars, first))
    return Distribution(low, median, float(values.mean()), p95, high, histogram=bins)


def share_distribution(values: np.ndarray) -> Distribution:
    """Of shares between 0 and 1; ten bins."""
    if len(values) == 0:
        return Distribution(0, 0, 0, 0, 0, histogram=())
    counts = np.bincount(np.minimum((values * 10).astype(np.int64), 9), minlength=10)
    bins = tuple(Bin(i / 10, (i + 1) / 10, int(count)) for i, count in enumerate(counts))
    low, median, p95, high = np.quantile(values, [0, 0.5, 0.95, 1], method="nearest").tolist()
    return Distribution(low, median, float(values.mean()), p95, high, histogram=bins)


def round_width(span: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 … that covers ``span`` values in NUM_BINS bins: 1000 -> 100."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale * NUM_BINS >= span:
                return step * scale
        scale *= 10
