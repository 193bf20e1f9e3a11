"""Statistics against values by hand and against computations of another kind."""

import itertools
import math
import random

import pytest

from alignment.comparison.statistics import holm, paired_difference, ranks, sign_test, unpaired_difference
from alignment.evaluation.intervals import wilson_interval


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    # By hand: 2 * (1 + 5) / 32; 2 / 32; all of a tie; nothing to tell; 2 * (1 + 10 + 45) / 1024.
    [(4, 1, 0.375), (5, 0, 0.0625), (3, 3, 1.0), (0, 0, 1.0), (8, 2, 0.109375)],
)
def test_sign_test(better, worse, p):
    assert sign_test(better, worse) == pytest.approx(p)
    assert sign_test(worse, better) == pytest.approx(p)


def test_sign_test_by_enumeration():
    """Over all 2^9 outcomes of fair coins: those at least as far from the middle as 7 of 9."""
    far = sum(abs(sum(tosses) - 4.5) >= 2.5 for tosses in itertools.product((0, 1), repeat=9))
    assert sign_test(7, 2) == pytest.approx(far / 2**9)


def test_paired_difference_is_over_shared_items():
    found = paired_difference({"a": 1.0, "b": 1.0, "c": 0.0, "x": 1.0}, {"a": 0.0, "b": 1.0, "c": 1.0, "y": 0.0})
    assert (found.value, found.better, found.worse, found.count) == (0.0, 1, 1, 3)
    assert found.is_noise
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None


def test_the_bootstrap_has_the_width_of_the_normal_interval():
    rng = random.Random(0)
    a = {str(i): rng.gauss(1.0, 1.0) for i in range(400)}
    b = {str(i): rng.gauss(0.8, 1.0) for i in range(400)}
    differences = [a[i] - b[i] for i in a]
    mean = sum(differences) / 400
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 399 / 400)
    found = paired_difference(a, b)
    assert found.value == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.012)
    swapped = paired_difference(b, a)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low), abs=2e-3)
    assert paired_difference(a, dict(reversed(b.items()))) == found, "the order of items says nothing"


def test_items_that_never_differed_might_have():
    """The interval is that of one more item to either side: with 48 that are level, of draws of 50 with one each."""
    level = {str(i): 1.0 for i in range(48)}
    found = paired_difference(level, level)
    rng = random.Random(0)
    drawn = sorted(sum(rng.choices((0, 1, -1), (48, 1, 1), k=50)) for _ in range(20_000))
    assert (found.low, found.high) == (pytest.approx(drawn[500] / 50), pytest.approx(drawn[-500] / 50))
    assert found.value == 0 and found.is_noise


def test_pairing_sees_what_two_intervals_do_not():
    """A better by one step on 12 of 40 items and never worse: certain by pairs, noise by two shares."""
    a = {str(i): float(i < 26) for i in range(40)}
    b = {str(i): float(i < 14) for i in range(40)}
    found = paired_difference(a, b)
    assert (found.value, found.better, found.worse) == (pytest.approx(0.3), 12, 0)
    assert not found.is_noise
    assert unpaired_difference(
        22 / 40, wilson_interval(22 / 40, 40), 16 / 40, wilson_interval(16 / 40, 40), 40
    ).is_noise


def test_newcombe():
    """The example of Newcombe (1998), 56/70 against 48/80: method 10 gives 0.0524 to 0.3339."""
    found = unpaired_difference(56 / 70, wilson_interval(56 / 70, 70), 48 / 80, wilson_interval(48 / 80, 80), 70)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert found.p is None


def test_holm():
    # By hand: 0.01 * 3, 0.02 * 2, max(0.04, 0.03 * 1); order kept; never above 1.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_ranks():
    assert ranks([0.5, 0.9, 0.5, 0.1]) == [2.5, 1.0, 2.5, 4.0]
