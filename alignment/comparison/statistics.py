"""Tests of whether a difference between two variants is more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from alignment.evaluation.intervals import Z

RESAMPLES = 10_000
"""Bootstrap resamples of an interval."""

_CHUNK = 500


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better a is than b.

    Attributes:
        value: mean of a minus mean of b.
        low, high: its 95% interval.
        p: two-sided p value of no difference; None if a and b saw different items.
        better, worse: numbers of items on which a did better and worse than b; None like `p`.
        count: number of items.
        variance: of an item's difference, with the items that the interval adds.
    """

    value: float
    low: float
    high: float
    p: float | None
    better: int | None
    worse: int | None
    count: int
    variance: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds zero."""
        return self.low <= 0 <= self.high


def sign_test(better: int, worse: int) -> float:
    """Two-sided p value of the exact test that both are equally likely. For right and wrong answers it is McNemar's."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> Difference | None:
    """Difference over the items that both have; values are in [0, 1]. None if they share fewer than two items.

    The interval is the percentile bootstrap over those items and two more: one that only a gets right and one that only
    b gets right. Without these two, the bootstrap would conclude from items that never differ that they never will.
    Agresti and Min (2005) mend the normal interval in the same way.
    """
    shared = sorted(a.keys() & b.keys())
    if len(shared) < 2:
        return None
    differences = np.array([a[item] - b[item] for item in shared])
    drawn_from = np.append(differences, [1.0, -1.0])
    rng = np.random.default_rng(0)  # the same files give the same report
    means = [
        drawn_from[rng.integers(len(drawn_from), size=(_CHUNK, len(drawn_from)))].mean(1)
        for _ in range(RESAMPLES // _CHUNK)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    p, spread = sign_test(better, worse), float(drawn_from.var())
    return Difference(float(differences.mean()), float(low), float(high), p, better, worse, len(shared), spread)


def unpaired_difference(
    a: float, bounds_a: tuple[float, float], b: float, bounds_b: tuple[float, float], count: int
) -> Difference:
    """Difference of two shares of different items, with Newcombe's (1998) interval made from the intervals of both."""
    (low_a, high_a), (low_b, high_b) = bounds_a, bounds_b
    low = a - b - math.hypot(a - low_a, high_b - b)
    high = a - b + math.hypot(high_a - a, b - low_b)
    variance = count * ((high - low) / (2 * Z)) ** 2
    return Difference(a - b, low, high, None, None, None, count, variance)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm-adjusted p values: the chance of any false alarm among the tests stays that of a single one."""
    adjusted = [0.0] * len(ps)
    highest = 0.0
    for done, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        highest = max(highest, min(1.0, ps[i] * (len(ps) - done)))
        adjusted[i] = highest
    return adjusted


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the highest; equal values share the mean of their ranks."""
    return pd.Series(values, dtype=float).rank(ascending=False).tolist()
