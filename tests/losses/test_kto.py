"""KTO against a batch worked out by hand, with the clamp of z0 at work and not."""

from math import log

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import KTO

LOSS = {"beta": 1.0, "desirable_weight": 1.5, "undesirable_weight": 0.7}

POLICY = [[log(3) - 1.0, log(2) - 1.0], [log(6) - 2.0], [-1.0, -0.5, -1.5]]
REFERENCE = [[-1.0, -1.0], [-2.0], [-0.5, -1.5, -1.0]]
LABELS = [True, False, True]
"""Summed log-ratios u: log 3 + log 2 = log 6, log 6, -0.5 + 1 - 0.5 = 0."""

ONES = [[-1.0]] * 3


@pytest.mark.parametrize(
    ("mismatched", "z0", "losses", "weights"),
    [
        # Companions' ratios 4 log 2, -2 log 2, log 2: mean log 2, so u - z0 = log 3, log 3, -log 2.
        # S(log 3) = 3/4, S(-log 2) = 1/3. Desirable: 1.5 * 1/4 and 1.5 * 2/3. Undesirable, and preferred all the same:
        # 0.7 * 3/4. G = weight * S (1 - S): 1.5 * 3/16, 0.7 * 3/16, 1.5 * 2/9.
        ([4 * log(2), -2 * log(2), log(2)], log(2), (0.375, 0.525, 1.0), (1.5 * 3 / 16, 0.7 * 3 / 16, 1 / 3)),
        # Ratios 2 log 2, -4 log 2, log 2: the mean is negative, z0 = 0, so u - z0 = log 6, log 6, 0.
        # S(log 6) = 6/7, S(0) = 1/2: 1.5 / 7, 0.7 * 6/7, 1.5 / 2. G = 1.5 * 6/49, 0.7 * 6/49, 1.5 / 4.
        # Clamped one by one before the mean, z0 would be log 2 as above.
        ([2 * log(2), -4 * log(2), log(2)], 0.0, (1.5 / 7, 0.6, 0.75), (9 / 49, 4.2 / 49, 0.375)),
    ],
)
def test_by_hand(inputs, gradients, mismatched, z0, losses, weights):
    loss, step = KTO(**LOSS), inputs(POLICY, REFERENCE, LABELS)
    step_statistics = loss.step_statistics(inputs([[r - 1.0] for r in mismatched], ONES))
    assert step_statistics.tolist() == pytest.approx([sum(mismatched), 3], rel=1e-12)
    output = loss(step, step_statistics)
    assert output.losses.tolist() == pytest.approx(losses, rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([log(6), log(6), 0], abs=1e-12)
    assert output.parts["kl"].tolist() == pytest.approx([z0] * 3, abs=1e-12)
    first, second, third = gradients(output.losses, step)
    assert first == pytest.approx([-weights[0]] * 2, rel=1e-12)
    assert second == pytest.approx([weights[1]], rel=1e-12)
    assert third == pytest.approx([-weights[2]] * 3, rel=1e-12)


def test_beta_multiplies_z0_too(inputs):
    """Beta 2, u = log 6, z0 = log 2: S(2 log 3) = 9/10, so a desirable row of weight 1.5 loses 0.15."""
    loss = KTO(**LOSS | {"beta": 2.0})
    output = loss(inputs(POLICY, REFERENCE, LABELS), torch.tensor([3 * log(2), 3.0], dtype=torch.float64))
    assert output.losses[0].item() == pytest.approx(0.15, rel=1e-12)
    assert output.rewards[0].item() == pytest.approx(2 * log(6), rel=1e-12)


def test_z0_is_the_mean_of_the_step_and_not_of_its_parts(inputs):
    """Parts with ratios (4, -2) and (-5): z0 is max(0, -3/3) = 0, the mean of clamped parts would be 1/2."""
    loss = KTO(**LOSS)
    parts = [inputs([[-2.0], [-3.0]], [[-6.0], [-1.0]]), inputs([[-6.0]], [[-1.0]])]
    whole = inputs([[-2.0], [-3.0], [-6.0]], [[-6.0], [-1.0], [-1.0]])
    summed = sum(loss.step_statistics(part) for part in parts)
    assert summed.tolist() == loss.step_statistics(whole).tolist() == [-3.0, 3.0]
    assert loss(inputs(POLICY, REFERENCE, LABELS), summed).parts["kl"].tolist() == [0.0] * 3


def test_statistics_carry_no_gradient(inputs):
    loss = KTO(**LOSS)
    mismatched = inputs([[-1.0]] * 3, [[-2.0]] * 3)
    step_statistics = loss.step_statistics(mismatched)
    assert mismatched.policy.values.requires_grad
    assert not step_statistics.requires_grad
    tracked = step_statistics.clone().requires_grad_()
    output = loss(inputs(POLICY, REFERENCE, LABELS), tracked)
    assert torch.autograd.grad(output.losses.sum(), tracked, allow_unused=True) == (None,)


@pytest.mark.parametrize(("rows", "pairs"), [(2, [(0, 1), (1, 0)]), (5, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)])])
def test_mismatched_rows_are_a_cyclic_shift(rows, pairs):
    assert KTO(**LOSS).mismatched(rows) == pairs


def test_one_row_has_no_companion():
    with pytest.raises(ValueError, match="mismatched"):
        KTO(**LOSS).mismatched(1)


def test_says_what_it_needs(inputs):
    loss = KTO(**LOSS)
    with pytest.raises(ValueError, match="statistics"):
        loss(inputs(POLICY, REFERENCE, LABELS))
    with pytest.raises(ValueError, match="label"):
        loss(inputs(POLICY, REFERENCE), torch.tensor([0.0, 3.0]))


@pytest.mark.parametrize("key", ["beta", "desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses(key, value):
    with pytest.raises(UserError, match=rf"loss\.{key} must be"):
        KTO(**LOSS | {key: value})
