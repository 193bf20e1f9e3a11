"""Confidence of a reward model against how often it is right."""

import math

import numpy as np
import pytest

from alignment.evaluation.calibration import calibration_error, reliability


def test_bins_by_hand():
    """Twenty pairs in two bins: ten with margins of 0, half of which count, and ten that are right at log 3, which is a
    confidence of three quarters."""
    margins = [0.0] * 10 + [math.log(3)] * 10
    first, second = reliability(margins)
    assert (first.pairs, first.confidence, first.accuracy) == (10, 0.5, 0.5)
    assert (second.pairs, second.accuracy) == (10, 1.0)
    assert second.confidence == pytest.approx(0.75)
    assert calibration_error(margins) == pytest.approx(0.125)


def test_a_model_that_is_sure_and_wrong():
    """Large margins of the wrong sign do not overflow, and the error is 1."""
    assert calibration_error([-2000.0] * 40) == pytest.approx(1.0)


def test_outcomes_drawn_from_the_model_are_calibrated():
    """The signs of 20 000 margins are drawn with the model's own probabilities: the error is that of chance."""
    rng = np.random.default_rng(0)
    sizes = rng.exponential(1.5, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-sizes))
    margins = np.where(right, sizes, -sizes)
    assert calibration_error(margins.tolist()) < 0.015
    assert calibration_error((3 * margins).tolist()) > 0.08


@pytest.mark.parametrize("count", [1, 9, 25])
def test_few_pairs_make_few_bins(count):
    """At most one bin for every ten pairs, and every pair is in one."""
    bins = reliability([0.1 * i for i in range(count)])
    assert sum(part.pairs for part in bins) == count
    assert len(bins) == max(1, count // 10)
