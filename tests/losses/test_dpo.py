"""DPO and conservative DPO against values worked out by hand."""

from math import exp, log

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import DPO

PREFERS_CHOSEN = ([[-1.0, log(3) - 2.0], [-1.0, -1.0, -1.0]], [[-1.5, -1.5], [-0.5, -1.5, -1.0]])
"""u = log 3 (tokens 0.5 and log 3 - 0.5), v = 0 (tokens -0.5, 0.5, 0): d = log 3."""

PREFERS_REJECTED = ([[-2.0, -1.0], [-0.25, -0.25, -0.5]], [[-1.5, -0.5], [-0.5, -1.0, -0.5]])
"""u = -1, v = 1: d = -2."""


@pytest.mark.parametrize(
    ("pair", "beta", "smoothing", "loss", "weight", "rewards"),
    [
        # beta d = log 3, S(-log 3) = 1/4: L = -log(3/4) = log(4/3), G = 1/4.
        (PREFERS_CHOSEN, 1.0, 0.0, log(4 / 3), 1 / 4, (log(3), 0)),
        # The optimum of e = 1/4 is at beta d = log((3/4) / (1/4)) = log 3: G = 1/4 - 1/4 = 0,
        # L = 3/4 log(4/3) + 1/4 (-log(1/4)) = 3/4 log(4/3) + 1/4 log 4.
        (PREFERS_CHOSEN, 1.0, 0.25, 0.75 * log(4 / 3) + 0.25 * log(4), 0.0, (log(3), 0)),
        # beta d = 2 log 3 = log 9, S(-log 9) = 1/10: L = log(10/9), G = beta / 10; smoothed with e = 1/4, past its
        # optimum, G = 2 (1/10 - 1/4) = -0.3: the margin is pulled back.
        (PREFERS_CHOSEN, 2.0, 0.0, log(10 / 9), 0.2, (2 * log(3), 0)),
        (PREFERS_CHOSEN, 2.0, 0.25, 0.75 * log(10 / 9) + 0.25 * log(10), -0.3, (2 * log(3), 0)),
        # beta d = -1: L = log(1 + e), G = 1/2 S(1) = 1/2 e / (1 + e).
        (PREFERS_REJECTED, 0.5, 0.0, log(1 + exp(1)), 0.5 * exp(1) / (1 + exp(1)), (-0.5, 0.5)),
        # The same with e = 1/4: L = 3/4 log(1 + e) + 1/4 log(1 + 1/e) = log(1 + e) - 1/4, as the two differ by 1.
        (PREFERS_REJECTED, 0.5, 0.25, log(1 + exp(1)) - 0.25, 0.5 * (exp(1) / (1 + exp(1)) - 0.25), (-0.5, 0.5)),
    ],
)
def test_by_hand(inputs, gradients, pair, beta, smoothing, loss, weight, rewards):
    step = inputs(*pair)
    output = DPO(beta=beta, label_smoothing=smoothing)(step)
    assert output.losses.tolist() == pytest.approx([loss], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx(rewards, abs=1e-12)
    chosen, rejected = gradients(output.losses, step)
    assert chosen == pytest.approx([-weight] * 2, abs=1e-12)
    assert rejected == pytest.approx([weight] * 3, abs=1e-12)


def test_small_ratios_survive_long_sequences_in_float32(inputs):
    """A ratio of 2^-12 per token over 1024 tokens of -0.7 nats is 0.25; sums of 717 nats are rounded to 6e-5."""
    reference = [[-0.7] * 1024, [-0.7] * 1024]
    policy = [[-0.7 + 2**-12] * 1024, [-0.7] * 1024]
    rewards = DPO(beta=1.0, label_smoothing=0.0)(inputs(policy, reference, dtype=torch.float32)).rewards
    token = torch.tensor(-0.7 + 2**-12, dtype=torch.float32) - torch.tensor(-0.7, dtype=torch.float32)
    assert rewards.tolist() == pytest.approx([1024 * token.item(), 0.0], rel=1e-6)


@pytest.mark.parametrize("values", [{"beta": 0.0}, {"beta": float("inf")}, {"beta": float("nan")}])
def test_refuses_beta(values):
    with pytest.raises(UserError, match=r"loss\.beta must be"):
        DPO(**{"beta": 0.1, "label_smoothing": 0.0} | values)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, float("nan")])
def test_refuses_label_smoothing(smoothing):
    with pytest.raises(UserError, match=r"loss\.label_smoothing must be in \[0, 0\.5\)"):
        DPO(beta=0.1, label_smoothing=smoothing)


def test_refuses_a_missing_reference(inputs):
    with pytest.raises(ValueError, match="reference"):
        DPO(beta=0.1, label_smoothing=0.0)(inputs([[-1.0], [-1.0]]))
