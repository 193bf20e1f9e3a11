"""Confidence intervals of shares and win rates."""

from __future__ import annotations

import math
from math import sqrt

_Z = 1.959964


def win_interval(rate: float, tied: float, count: int) -> tuple[float, float]:
    """95% interval of a win rate among `count` pairs, of which a share `tied` counts one half each.

    It is Tango's (1998, Statistics in Medicine 17, 891-908) for the difference of paired proportions, here of wins and
    losses, moved to the rate: it holds every rate that a score test does not reject, with the variance that the most
    likely wins, ties and losses of that rate have. Without ties it is Wilson's. Computed exactly for 12 to 400 pairs,
    0 to 95% ties and wins of 50 to 95% of the rest, it holds the true rate with probability 0.923 at the least (25
    pairs without ties, as Wilson's does there) and 0.950 to 0.973 in the mean over those cases, where Wilson's, which
    takes ties for half wins and half losses, has 0.985 to 0.989 and at 85% ties is 1.7 to 2.5 times as wide.
    """
    won, lost = rate - tied / 2, 1 - rate - tied / 2

    def is_rejected(true: float) -> bool:
        linear = tied + won * (1 - true) + lost * true
        ties = linear - sqrt(max(linear**2 - 4 * tied * true * (1 - true), 0.0))  # the most likely share
        return count * (rate - true) ** 2 > _Z**2 * (true * (1 - true) - ties / 4)

    def bound(outer: float) -> float:
        inner = rate
        for _ in range(50):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if is_rejected(middle) else (middle, outer)
        return outer

    return bound(0.0), bound(1.0)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share observed among `count` independent cases, after Wilson (1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
