"""Summaries of many numbers: median, minimum, maximum, and percentiles."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import msgspec

__all__ = ["Spread", "percentile", "spread"]


class Spread(msgspec.Struct, frozen=True):
    """Median, minimum and maximum of a series."""

    median: float
    min: float
    max: float


def spread(numbers: Sequence[float]) -> Spread:
    """Summarise at least one number."""
    return Spread(statistics.median(numbers), min(numbers), max(numbers))


def percentile(numbers: Sequence[float], percent: float) -> float:
    """Return the smallest of the numbers that at least `percent` per cent of them do not exceed."""
    ordered = sorted(numbers)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
