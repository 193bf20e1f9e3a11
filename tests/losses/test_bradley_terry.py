"""The loss of reward models against numbers worked out by hand, and what it refuses."""

from math import exp, log

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import DPO, BradleyTerry, LossInputs, Mixture
from alignment.types import RaggedLogps
from tests.helpers.trl_stubs import trl_reward

REWARDS = [1.5, 0.25, -0.5, 0.75]
"""Of two pairs, the second of which the model ranks wrongly."""


def step(scores=None):
    values = torch.tensor(REWARDS, dtype=torch.float64, requires_grad=True)
    given = None if scores is None else torch.tensor(scores, dtype=torch.float64)
    return LossInputs(RaggedLogps(values, torch.arange(5)), scores=given, lengths=torch.tensor([3, 4, 5, 6]))


def test_the_loss_by_hand():
    """log(1 + e^-1.25) and log(1 + e^1.25), with 0.01 times 1.75^2 and 0.25^2."""
    output = BradleyTerry(centring=0.01, margin=0.0)(step())
    expected = [log(1 + exp(-1.25)) + 0.030625, log(1 + exp(1.25)) + 0.000625]
    assert output.losses.tolist() == pytest.approx(expected, rel=1e-14)
    assert output.rewards.tolist() == REWARDS
    assert output.parts["centring"].tolist() == pytest.approx([3.0625, 0.0625])


def test_the_margin_is_the_gap_of_the_scores():
    """A setting of 0.5 asks for a lead of half the gap: 1 for scores of 5 and 3, 0 for equal scores."""
    output = BradleyTerry(centring=0.0, margin=0.5)(step([5, 3, 2, 2]))
    assert output.losses.tolist() == pytest.approx([log(1 + exp(-0.25)), log(1 + exp(1.25))], rel=1e-14)
    assert output.parts["margin"].tolist() == [1.0, 0.0]


def test_the_gradient_by_hand():
    """By r_w it is -S(m - d) + 2c (r_w + r_l), by r_l it is S(m - d) + 2c (r_w + r_l)."""
    inputs = step()
    BradleyTerry(centring=0.01, margin=0.0)(inputs).losses.sum().backward()
    slopes = [1 / (1 + exp(1.25)), 1 / (1 + exp(-1.25))]
    expected = [-slopes[0] + 0.035, slopes[0] + 0.035, -slopes[1] + 0.005, slopes[1] + 0.005]
    assert inputs.policy.values.grad.tolist() == pytest.approx(expected, rel=1e-12)


def test_trl_has_the_same_loss_and_metrics():
    """TRL's RewardTrainer on the same rewards, margins and coefficient: the loss, its accuracy and its margin."""
    inputs = step([5, 3, 2, 1.5])
    output = BradleyTerry(centring=0.02, margin=1.0)(inputs)
    loss, logged = trl_reward(inputs.policy.values.detach(), torch.tensor([2.0, 0.5]), center_rewards_coefficient=0.02)
    assert output.losses.mean().item() == pytest.approx(loss.item(), rel=1e-12)
    assert (logged["accuracy"], logged["margin"], logged["mean_reward"]) == pytest.approx((0.5, 0.0, 0.5))


def test_rewards_at_the_start_have_a_closed_form():
    """The check before the first update computes it apart from the loss, with centring and margin."""
    loss = BradleyTerry(centring=0.3, margin=0.5)
    inputs = step([5, 3, 2, 2])
    torch.testing.assert_close(loss.at_reference(inputs), loss(inputs).losses.detach(), rtol=1e-12, atol=0)


def test_a_margin_needs_scores_and_a_better_chosen_answer():
    """Without a margin no scores are read."""
    without, with_one = BradleyTerry(centring=0.0, margin=0.0), BradleyTerry(centring=0.0, margin=1.0)
    assert (without.requirements().scores, with_one.requirements().scores) == (False, True)
    assert without.problem(2, (1.0, 3.0)) is None
    assert with_one.problem(2, (1.0, 3.0)) == "scores its chosen completion 2 lower than its rejected one"


def test_no_part_of_a_mixture():
    """Other losses read log-probs, which a reward model has not."""
    parts = {"dpo": DPO(beta=0.1, label_smoothing=0.0), "bradley_terry": BradleyTerry(centring=0.0, margin=0.0)}
    with pytest.raises(UserError, match=r"loss\.weights cannot name bradley_terry: it trains a reward model"):
        Mixture(weights={"dpo": 1.0, "bradley_terry": 1.0}, settings=parts)
