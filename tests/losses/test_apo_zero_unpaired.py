"""APO-zero of single rows against a batch worked out by hand, and beside the losses that it is made of."""

from math import log

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import KTO, APOZero, APOZeroUnpaired

VALUES = {"beta": 1.0, "desirable_weight": 1.5, "undesirable_weight": 0.7}

POLICY = [[log(3) - 1.0, log(2) - 1.5], [-1.5 - log(2)], [-1.0, -0.5, -1.5]]
REFERENCE = [[-1.0, log(2) - 1.5], [-1.5], [-0.5, -1.5, -1.0]]
LABELS = [True, False, True]
"""Summed log-ratios u: log 3, -log 2, 0."""


def test_by_hand(inputs, gradients):
    """S(-log 3) = 1/4, S(-log 2) = 1/3, S(0) = 1/2, each times its weight; the gradient is weight S (1 - S)."""
    step = inputs(POLICY, REFERENCE, LABELS)
    output = APOZeroUnpaired(**VALUES)(step)
    assert output.losses.tolist() == pytest.approx([0.375, 0.7 / 3, 0.75], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([log(3), -log(2), 0], abs=1e-12)
    first, second, third = gradients(output.losses, step)
    assert first == pytest.approx([-1.5 * 3 / 16] * 2, rel=1e-12)
    assert second == pytest.approx([0.7 * 2 / 9], rel=1e-12)
    assert third == pytest.approx([-0.375] * 3, rel=1e-12)


def test_beta_multiplies_the_log_ratio(inputs):
    """Beta 2: S(-2 log 3) = 1/10, S(-2 log 2) = 1/5."""
    output = APOZeroUnpaired(**VALUES | {"beta": 2.0})(inputs(POLICY, REFERENCE, LABELS))
    assert output.losses.tolist() == pytest.approx([0.15, 0.14, 0.75], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([2 * log(3), -2 * log(2), 0], abs=1e-12)


def test_a_pair_as_two_rows_is_apo_zero(inputs):
    """The two losses of the rows add up to that of the pair."""
    pair = APOZero(beta=0.4)(inputs(POLICY[:2], REFERENCE[:2])).losses
    rows = APOZeroUnpaired(beta=0.4, desirable_weight=1.0, undesirable_weight=1.0)(
        inputs(POLICY[:2], REFERENCE[:2], LABELS[:2])
    ).losses
    assert rows.sum().item() == pytest.approx(pair.item(), rel=1e-12)


def test_it_is_kto_without_a_baseline(inputs):
    """KTO with z0 = 0 has the same losses; with another z0 it does not."""
    step = inputs(POLICY, REFERENCE, LABELS)
    ours = APOZeroUnpaired(**VALUES)(step).losses
    for total, same in ((0.0, True), (3.0, False)):
        kto = KTO(**VALUES)(step, torch.tensor([total, 3.0], dtype=torch.float64)).losses
        assert torch.allclose(ours, kto, rtol=1e-12) is same


def test_one_row_is_a_step():
    """No answers to other prompts are scored, so a step may have one row, unlike KTO's."""
    loss = APOZeroUnpaired(**VALUES)
    assert loss.requirements().min_items == 1 and loss.mismatched(1) == []
    assert KTO(**VALUES).requirements().min_items == 2


@pytest.mark.parametrize("key", ["beta", "desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses(key, value):
    """The strength and both weights are finite and above 0."""
    with pytest.raises(UserError, match=rf"loss\.{key} must be"):
        APOZeroUnpaired(**VALUES | {key: value})
