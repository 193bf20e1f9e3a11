"""How many held-out items or seeds tell a difference, and which difference those at hand can tell.

Told means: found by a two-sided test of this level, with a probability of `POWER` if the true difference is this one.
These are plans: true shares and spreads are not known, and a difference that few items show may be far from the true
one.
"""

from __future__ import annotations

from math import ceil, erfc, floor, inf, lgamma, log, sqrt
from statistics import NormalDist

import numpy as np

POWER = 0.8
"""The probability with which a difference of the planned size is found."""

LEVEL = 0.05
"""The probability, without any difference, that a test finds one."""

_OTHER = 0.85
"""The power of the other of two tests that mostly agree, so that both find a difference with about `POWER`."""

_DOUBT = 2.0
"""The squares of the two items that the interval of a paired difference adds, 1 and -1."""

_MOST_SEEDS = 1000
"""From here on the normal formula for seeds is exact enough."""

_NORMAL = NormalDist()


def items_for_sign_test(better: float, worse: float, level: float = LEVEL, power: float = POWER) -> float:
    """Items for which the exact sign test (McNemar's) finds that it is better on more of them than worse, or on fewer.

    n = (z_a sqrt(p) + z_b sqrt(p - d^2))^2 / d^2 + 1 / |d|, where p = better + worse is the share of items that differ
    and d = better - worse (Connor 1987, Biometrics 43, 207-211); 1 / |d| is the continuity correction, which the exact
    test needs. Computed exactly, the power at this n is 0.77 to 0.83 while at least a tenth of the items that differ
    speak for the other side. If fewer do, it is up to 0.92: then fewer items would do.

    Args:
        better, worse: shares of all items, in [0, 1]; the rest is level.

    Returns:
        Infinity if both are equal.
    """
    differ, ahead = better + worse, abs(better - worse)
    if not ahead:
        return inf
    z_level, z_power = _NORMAL.inv_cdf(1 - level / 2), _NORMAL.inv_cdf(power)
    return (z_level * sqrt(differ) + z_power * sqrt(differ - ahead**2)) ** 2 / ahead**2 + 1 / ahead


def items_for_mean(
    difference: float, variance: float, level: float = LEVEL, power: float = POWER, doubt: float = 0.0
) -> float:
    """Items for which the normal interval of a mean excludes zero: n = (z_a + z_b)^2 v / d^2 without doubt.

    In general n d >= z_a sqrt(n v + doubt) + z_b sqrt(n v), solved for n after the right side was replaced by
    (z_a + z_b) sqrt(n v + doubt z_a / (z_a + z_b)), which is at least as large since the root is concave.

    Args:
        difference: the mean over items.
        variance: of an item's difference.
        doubt: a sum of squares that the interval adds to that of the items.

    Returns:
        Infinity if the difference is zero.
    """
    if not difference:
        return inf
    z_level, both = _NORMAL.inv_cdf(1 - level / 2), _NORMAL.inv_cdf(1 - level / 2) + _NORMAL.inv_cdf(power)
    half = both**2 * variance / 2
    return (half + sqrt(half**2 + difference**2 * both * z_level * doubt)) / difference**2


def items_needed(better: float, worse: float, difference: float, variance: float, level: float = LEVEL) -> float:
    """Items for which the sign test and the interval of the mean both tell two variants apart, as a comparison asks.

    For items that are right or wrong the two are one question, and the sign test asks for more. Where items have
    values in between, as means over seeds do, each test may fail alone, so the other has a little more power.

    Args:
        better, worse: shares of all items on which the first does better, and worse.
        difference, variance: of an item's values, in [-1, 1].

    Returns:
        Infinity if there is no difference, or if the mean and the counts speak for different sides.
    """
    if (better - worse) * difference <= 0:
        return inf
    is_binary = abs(variance - (better + worse - difference**2)) < 1e-9
    each, other = (
        (
            items_for_sign_test(better, worse, level, power),
            items_for_mean(difference, variance, level, power, _DOUBT),
        )
        for power in (POWER, POWER if is_binary else _OTHER)
    )
    return max(*each, min(other))


def seeds_needed(difference: float, spread: float, level: float = LEVEL) -> float:
    """The fewest seeds for which a paired t test over seeds tells two variants apart; at least 2.

    The power is that of the noncentral t distribution. The search begins at n = (z_a + z_b)^2 s^2 / d^2 + z_a^2 / 2
    (Guenther 1981, The American Statistician 35, 243-244), which is at most two seeds away.

    Args:
        spread: standard deviation, over seeds, of the difference between two variants with the same seed.

    Returns:
        A whole number; infinity if the difference is zero.
    """
    if not difference:
        return inf
    z_level, z_power = _NORMAL.inv_cdf(1 - level / 2), _NORMAL.inv_cdf(POWER)
    about = ((z_level + z_power) * spread / difference) ** 2 + z_level**2 / 2
    if about > _MOST_SEEDS:
        return float(ceil(about))
    seeds = max(2, floor(about) - 1)
    while spread and t_test_power(abs(difference) / spread, seeds, level) < POWER:
        seeds += 1
    return float(seeds)


def t_test_power(effect: float, seeds: int, level: float = LEVEL) -> float:
    """Power of the two-sided t test of a mean that is `effect` standard deviations from zero, over `seeds` values."""
    low, high = 0.0, 10 / level  # of the critical value, which is highest with one degree of freedom
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if _rejected(0.0, middle, seeds) < level else (middle, high)
    return _rejected(effect * sqrt(seeds), high, seeds)


def least_mean(seeds: int, spread: float, level: float = LEVEL) -> float | None:
    """The smallest mean difference that so many seeds tell, by `t_test_power`; None for one seed: it has no spread."""
    if seeds < 2:
        return None
    low, high = 0.0, 10 / level
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if t_test_power(middle, seeds, level) >= POWER else (middle, high)
    return high * spread


def _rejected(shift: float, critical: float, seeds: int) -> float:
    """P(|Z + shift| > critical S), where S^2 is a chi-square over its degrees of freedom: an integral over log S."""
    free = seeds - 1
    width = 6 / sqrt(2 * free)
    grid = np.linspace(-width - 12 / free, width, 300)
    constant = (free / 2) * log(free / 2) - lgamma(free / 2) + log(2)
    density = np.exp(constant + free * grid - free * np.exp(2 * grid) / 2)
    edges = critical * np.exp(grid)
    beyond = [(erfc((edge - shift) / sqrt(2)) + erfc((edge + shift) / sqrt(2))) / 2 for edge in edges.tolist()]
    return float(density @ beyond * (grid[1] - grid[0]))


def least_difference(items: int, differ: float, level: float = LEVEL) -> float | None:
    """The smallest difference of two shares that so many items tell, by `items_for_sign_test`.

    Args:
        differ: the share of items on which the two are not level.

    Returns:
        None if not even items that all speak for one side are told.
    """

    def is_told(difference: float) -> bool:
        return items_for_sign_test((differ + difference) / 2, (differ - difference) / 2, level) <= items

    if not is_told(differ):
        return None
    low, high = 0.0, differ
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if is_told(middle) else (middle, high)
    return high
