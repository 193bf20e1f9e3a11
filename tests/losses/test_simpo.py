"""SimPO against values worked out by hand."""

from math import exp, log

import pytest

from alignment.errors import UserError
from alignment.losses import SimPO

PREFERS_CHOSEN = [[-0.5, -1.5], [-2.0, -1.0, -0.5, -2.5]]
"""Means -1 over 2 tokens and -6 / 4 = -1.5."""

PREFERS_REJECTED = [[-1.0, -3.0], [-0.25, -0.75, -0.5, -0.5]]
"""Means -2 over 2 tokens and -2 / 4 = -0.5."""


@pytest.mark.parametrize(
    ("pair", "ratio", "loss", "weights", "rewards"),
    [
        # beta = 2 throughout. 2 (0.5 - 0.5) = 0: L = log 2; G = 2 S(0) / n = 1 / n.
        (PREFERS_CHOSEN, 0.5, log(2), (1 / 2, 1 / 4), (-2, -3)),
        # 2 (0.5 - 0) = 1: L = log(1 + 1/e); G = 2 S(-1) / n = 2 / ((1 + e) n).
        (PREFERS_CHOSEN, 0.0, log(1 + exp(-1)), (1 / (1 + exp(1)), 0.5 / (1 + exp(1))), (-2, -3)),
        # 2 (-1.5 - 0.5) = -4: L = log(1 + e^4); G = 2 S(4) / n.
        (PREFERS_REJECTED, 0.5, log(1 + exp(4)), (1 / (1 + exp(-4)), 0.5 / (1 + exp(-4))), (-4, -1)),
    ],
)
def test_by_hand(inputs, gradients, pair, ratio, loss, weights, rewards):
    step = inputs(pair)
    output = SimPO(beta=2.0, gamma_beta_ratio=ratio)(step)
    assert output.losses.tolist() == pytest.approx([loss], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx(rewards, rel=1e-12)
    chosen, rejected = gradients(output.losses, step)
    assert chosen == pytest.approx([-weights[0]] * 2, rel=1e-12)
    assert rejected == pytest.approx([weights[1]] * 4, rel=1e-12)


def test_the_second_hyper_parameter_is_a_ratio(inputs):
    """Where beta grows, a margin of exactly the ratio stays the point where the loss is log 2."""
    for beta in (0.5, 2.0, 10.0):
        assert SimPO(beta=beta, gamma_beta_ratio=0.5)(inputs(PREFERS_CHOSEN)).losses.item() == pytest.approx(log(2))


def test_a_reference_changes_nothing(inputs):
    loss = SimPO(beta=2.0, gamma_beta_ratio=0.5)
    with_reference = loss(inputs(PREFERS_REJECTED, PREFERS_CHOSEN))
    assert with_reference.losses.tolist() == loss(inputs(PREFERS_REJECTED)).losses.tolist()


@pytest.mark.parametrize(
    ("key", "value"), [("beta", 0.0), ("gamma_beta_ratio", -0.1), ("gamma_beta_ratio", float("inf"))]
)
def test_refuses(key, value):
    with pytest.raises(UserError, match=rf"loss\.{key} must be"):
        SimPO(**{"beta": 2.0, "gamma_beta_ratio": 0.5} | {key: value})
