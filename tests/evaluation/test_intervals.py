"""Confidence intervals: against published numbers, the definition of a score interval, and exact coverage."""

import math

import pytest

from alignment.evaluation.intervals import tango_interval, wilson_interval

Z = 1.959964


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    # From the formula by hand: 0/10 -> z²/(10 + z²) = 0.2775; 5/10 is symmetric about one half.
    [(0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.5, 10, 0.2366, 0.7634), (0.8, 100, 0.7112, 0.8666)],
)
def test_wilson_interval(share: float, count: int, low: float, high: float) -> None:
    assert wilson_interval(share, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("share", "count"), [(0.5, 10), (0.03, 40), (0.9, 128), (0.25, 1000)])
def test_the_bounds_of_wilson_are_just_not_rejected(share, count):
    for bound in wilson_interval(share, count):
        assert count * (share - bound) ** 2 == pytest.approx(Z**2 * bound * (1 - bound))


@pytest.mark.parametrize(("wins", "ties", "losses"), [(6, 2, 2), (30, 40, 10), (20, 5, 8)])
def test_the_bounds_of_tango_are_just_not_rejected(wins, ties, losses):
    """With the variance of the most likely counts at the bound, which are sought on a grid."""
    count = wins + ties + losses
    rate = (wins + ties / 2) / count
    low, high = tango_interval(rate, ties / count, count)
    assert low < rate < high
    for bound in (low, high):
        assert (bound - rate) ** 2 == pytest.approx(Z**2 * least_variance(wins, ties, losses, bound) / count, rel=1e-4)


def least_variance(wins, ties, losses, rate):
    """Of one pair's score, for the most likely share of ties among those with this win rate, sought on a grid."""

    def log_likelihood(tied):
        return sum(
            count * math.log(share)
            for count, share in ((wins, rate - tied / 2), (ties, tied), (losses, 1 - rate - tied / 2))
        )

    most = 2 * min(rate, 1 - rate)
    tied = max((most * i / 20_000 for i in range(1, 20_000)), key=log_likelihood)
    return rate - tied / 4 - rate**2


def test_tango_interval_of_a_published_table():
    """1 better, 7 worse, 13 alike (Bentur et al. 2009): -0.517 to -0.026 (Fagerland, Lydersen and Laake 2014)."""
    low, high = tango_interval((1 + 13 / 2) / 21, 13 / 21, 21)
    assert (2 * low - 1, 2 * high - 1) == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize("count", [1, 12, 400])
def test_tango_interval_where_nothing_varies(count):
    z2 = Z**2
    # All ties: at a rate a < 1/2 the ties are at most 2a, so that n (1/2 - a)^2 = z^2 a (1/2 - a).
    low = count / 2 / (count + z2)
    assert tango_interval(0.5, 1.0, count) == pytest.approx((low, 1 - low))
    # All wins, where n (1 - p)^2 = z^2 p (1 - p); and no ties is Wilson's.
    assert tango_interval(1.0, 0.0, count) == pytest.approx((count / (count + z2), 1.0))
    assert tango_interval(0.0, 0.0, count) == pytest.approx((0.0, z2 / (count + z2)))
    for rate in (0.25, 0.5):
        assert tango_interval(rate, 0.0, count) == pytest.approx(wilson_interval(rate, count))


@pytest.mark.parametrize(("count", "least", "mean"), [(12, 0.948, 0.972), (25, 0.923, 0.961)])
def test_coverage_of_tango_interval(count, least, mean):
    """Exactly, over all outcomes: the probability that the interval holds the true rate."""
    bounds = {
        (wins, ties): tango_interval((wins + ties / 2) / count, ties / count, count)
        for wins in range(count + 1)
        for ties in range(count + 1 - wins)
    }
    covered = []
    for tied in (0.0, 0.3, 0.7, 0.95):
        for share in (0.5, 0.7, 0.95):
            won = (1 - tied) * share
            lost, rate = 1 - tied - won, won + tied / 2
            covered.append(
                sum(
                    math.comb(count, wins)
                    * math.comb(count - wins, ties)
                    * won**wins
                    * tied**ties
                    * lost ** (count - wins - ties)
                    for (wins, ties), (low, high) in bounds.items()
                    if low <= rate <= high
                )
            )
    assert min(covered) == pytest.approx(least, abs=1e-3)
    assert sum(covered) / len(covered) == pytest.approx(mean, abs=5e-3)
