"""One pair whose losses were worked out elsewhere, to ten digits."""

import pytest

from alignment.losses.parity import CHECKS, value_here


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.loss.name} {check.formula}")
def test_published_pair(check):
    """One pair with a = -2.5, A = -3, b = -5, B = -4.2 over 4 and 6 tokens: u = 0.5, v = -0.8, d = 1.3.

    DPO: log(1 + e^-0.13) = 0.630258; smoothed: + 0.1 * 0.13. IPO: (1.3 - 5)^2, and
    (0.125 + 0.8 / 6 - 5)^2. SimPO: log(1 + e^(1 - 2 (-0.625 + 5 / 6))); with its NLL + 0.625, with
    that of the gold answer (TPO-L) + 1.25.
    ORPO: p = e^-0.625 and e^(-5/6), w = 0.404395, 0.625 + 0.1 log(1 + e^-w). RePO: 0.5 + 0.625 - 5 / 6.
    KTO: half of APO-zero, since z0 = 0. BCO: delta = -0.015, log(1 + e^-0.065) for both rows. MPO: 0.8 DPO + 0.4 BCO +
    0.625.
    The scores are 4.5 and 3, the entropies 1/2; before a triple's chosen completion stands a gold one of 1.25 nats.
    """
    assert value_here(check.loss) == pytest.approx(check.formula, rel=2e-9)  # the values have ten digits
