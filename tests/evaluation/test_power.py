"""Power against values by hand, and against the share of simulated experiments whose tests find the difference."""

import math
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest

from alignment.comparison.statistics import sign_test
from alignment.evaluation.statistics.power import (
    items_for_mean,
    items_for_sign_test,
    items_needed,
    least_difference,
    seeds_needed,
    t_test_power,
)

EXPERIMENTS = 4000
"""The share of them that find a difference is then within 0.02 of the power."""


@cache
def told(better: int, worse: int, level: float) -> bool:
    return sign_test(better, worse) <= level


def found_by_signs(values: np.ndarray, level: float) -> np.ndarray:
    better, worse = (values > 1e-9).sum(1), (values < -1e-9).sum(1)
    return np.array([told(int(b), int(w), level) for b, w in zip(better, worse, strict=True)])


def found_by_interval(values: np.ndarray, level: float) -> np.ndarray:
    """Over the values and one item more for each side, as on the page."""
    n = values.shape[1] + 2
    mean = values.sum(1) / n
    error = np.sqrt(((values**2).sum(1) + 2) / n - mean**2) / math.sqrt(n)
    return np.abs(mean) > NormalDist().inv_cdf(1 - level / 2) * error


def items_of(rng, shape, better, worse):
    """1 for an item on which the first is better, -1 where it is worse, 0 for a tie."""
    drawn = rng.random(shape)
    return (drawn < better).astype(float) - (drawn > 1 - worse)


def test_items_by_hand():
    """(1.96 sqrt(0.2) + 0.8416 sqrt(0.19))^2 / 0.01 = 154.6, and 1 / 0.1 for the exact test."""
    assert items_for_sign_test(0.15, 0.05) == pytest.approx(164.6, abs=0.1)
    assert items_for_sign_test(0.05, 0.15) == items_for_sign_test(0.15, 0.05)
    assert items_for_mean(0.1, 0.19) == pytest.approx((1.959964 + 0.841621) ** 2 * 19)
    assert items_for_sign_test(0.15, 0.05, level=0.01) > items_for_sign_test(0.15, 0.05)


@pytest.mark.parametrize("level", [0.05, 0.0125])
@pytest.mark.parametrize(("better", "worse"), [(0.06, 0.01), (0.12, 0.06), (0.3, 0.2), (0.6, 0.25)])
def test_the_promised_items_find_a_difference_between_right_and_wrong(better, worse, level):
    variance = better + worse - (better - worse) ** 2
    items = math.ceil(items_needed(better, worse, better - worse, variance, level))
    assert items == math.ceil(items_for_sign_test(better, worse, level)), "the sign test asks for more"
    drawn = items_of(np.random.default_rng(0), (EXPERIMENTS, items), better, worse)
    found = found_by_signs(drawn, level) & found_by_interval(drawn, level)
    assert 0.77 <= found.mean() <= 0.83


def test_where_all_items_speak_for_one_side_fewer_would_do():
    items = math.ceil(items_for_sign_test(0.1, 0.0))
    assert (
        0.8 <= found_by_signs(items_of(np.random.default_rng(0), (EXPERIMENTS, items), 0.1, 0.0), 0.05).mean() <= 0.92
    )


@pytest.mark.parametrize(
    ("better", "worse", "seeds"), [(0.15, 0.08, 2), (0.3, 0.2, 2), (0.15, 0.08, 3), (0.3, 0.2, 3), (0.2, 0.08, 5)]
)
def test_the_promised_items_find_a_difference_of_means_over_seeds(better, worse, seeds):
    """Half of what a seed gives is the item's, half its own; either test may fail, and both are asked for."""
    rng = np.random.default_rng(0)

    def draw(experiments, items):
        shared = items_of(rng, (experiments, items), better, worse)
        own = [items_of(rng, (experiments, items), better, worse) for _ in range(seeds)]
        return np.mean([np.where(rng.random(shared.shape) < 0.5, shared, one) for one in own], axis=0)

    [many] = draw(1, 400_000)
    items = math.ceil(items_needed((many > 1e-9).mean(), (many < -1e-9).mean(), many.mean(), many.var()))
    drawn = draw(EXPERIMENTS, items)
    assert 0.77 <= (found_by_signs(drawn, 0.05) & found_by_interval(drawn, 0.05)).mean() <= 0.83


@pytest.mark.parametrize(
    ("effect", "level", "seeds", "power", "critical"),
    # Numbers of seeds with the power there from scipy.stats.nct; critical values from a table of Student's t.
    [(2.0, 0.05, 5, 0.9089, 2.776), (1.0, 0.05, 10, 0.8031, 2.262), (0.5, 0.05, 34, 0.8078, 2.035),
     (1.0, 0.0125, 15, 0.8249, None), (3.0, 0.05, 4, 0.9670, 3.182)],
)  # fmt: skip
def test_the_promised_seeds_find_a_difference_and_one_less_does_not(effect, level, seeds, power, critical):
    assert seeds_needed(effect, 1.0, level) == seeds_needed(-2 * effect, 2.0, level) == seeds
    assert t_test_power(effect, seeds, level) == pytest.approx(power, abs=1e-4)
    assert t_test_power(effect, seeds - 1, level) < 0.8
    if critical is not None:
        drawn = np.random.default_rng(0).normal(effect, 1.0, (20_000, seeds))
        found = np.abs(drawn.mean(1)) > critical * drawn.std(1, ddof=1) / math.sqrt(seeds)
        assert found.mean() == pytest.approx(power, abs=0.01)


def test_many_seeds_are_counted_without_a_search():
    """At the seam of the two formulas, (1.96 + 0.8416)^2 s^2 / d^2 + 1.92 gives what the search gives."""
    assert seeds_needed(0.1, 1.0) == 787
    assert seeds_needed(0.08, 1.0) == math.ceil((1.959964 + 0.841621) ** 2 / 0.0064 + 1.959964**2 / 2)
    assert t_test_power(0.08, int(seeds_needed(0.08, 1.0))) == pytest.approx(0.8, abs=1e-3)
    assert seeds_needed(0.1, 0.0) == 2, "a t test needs two"


def test_no_number_is_promised_for_no_difference():
    assert items_for_sign_test(0.2, 0.2) == items_for_mean(0.0, 0.5) == seeds_needed(0.0, 0.1) == math.inf
    assert items_needed(0.2, 0.2, 0.05, 0.3) == math.inf, "as many for it as against it"
    assert items_needed(0.1, 0.2, 0.05, 0.3) == math.inf, "the mean and the counts disagree"


def test_the_least_difference_is_the_one_that_needs_these_items():
    for items, differ in ((96, 0.2), (512, 0.1), (100, 0.9)):
        least = least_difference(items, differ)
        assert items_for_sign_test((differ + least) / 2, (differ - least) / 2) == pytest.approx(items)
    assert least_difference(10, 0.1) is None
