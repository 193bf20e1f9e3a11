"""IPO with means and with sums against values worked out by hand."""

import pytest

from alignment.errors import UserError
from alignment.losses import IPO
from alignment.losses.ipo import Reduction

PREFERS_CHOSEN = ([[-1.0, -2.0], [-1.0, -2.0, -1.0, -1.0]], [[-1.25, -2.75], [-0.5, -1.5, -0.5, -0.5]])
"""u = 0.25 + 0.75 = 1 over 2 tokens, v = -2 over 4: sums d = 3, means 0.5 and -0.5, h = 1."""

PREFERS_REJECTED = ([[-3.0, -2.0], [-0.5, -0.5, -1.0, -1.0]], [[-1.5, -1.5], [-1.5, -1.0, -2.5, -2.0]])
"""u = -1.5 - 0.5 = -2 over 2 tokens, v = 1 + 0.5 + 1.5 + 1 = 4 over 4: d = -6, means -1 and 1, h = -2."""


@pytest.mark.parametrize(
    ("pair", "reduction", "loss", "weights", "rewards"),
    [
        # tau = 1/4, so the target 1 / (2 tau) is 2 throughout.
        # (1 - 2)^2 = 1; G = 2 (2 - 1) / n: 1 over 2 tokens, 1/2 over 4.
        (PREFERS_CHOSEN, Reduction.mean, 1, (1, 0.5), (0.5, -0.5)),
        # (3 - 2)^2 = 1, but beyond the target: G = 2 (2 - 3) = -2, the margin is pulled back.
        (PREFERS_CHOSEN, Reduction.sum, 1, (-2, -2), (1, -2)),
        # (-2 - 2)^2 = 16; G = 2 (2 + 2) / n: 4 and 2.
        (PREFERS_REJECTED, Reduction.mean, 16, (4, 2), (-1, 1)),
        # (-6 - 2)^2 = 64; G = 2 (2 + 6) = 16.
        (PREFERS_REJECTED, Reduction.sum, 64, (16, 16), (-2, 4)),
    ],
)
def test_by_hand(inputs, gradients, pair, reduction, loss, weights, rewards):
    step = inputs(*pair)
    output = IPO(tau=0.25, reduction=reduction)(step)
    assert output.losses.tolist() == pytest.approx([loss], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx(rewards, rel=1e-12)
    chosen, rejected = gradients(output.losses, step)
    assert chosen == pytest.approx([-weights[0]] * 2, rel=1e-12)
    assert rejected == pytest.approx([weights[1]] * 4, rel=1e-12)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("inf")])
def test_refuses_tau(tau):
    with pytest.raises(UserError, match=r"loss\.tau must be"):
        IPO(tau=tau, reduction=Reduction.mean)
