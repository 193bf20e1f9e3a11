"""LD-DPO, WPO and AOT against TRL's own code, run as `trl_stubs` says."""

import pytest
import torch

from alignment.losses import AOT, DPO, LDDPO, WPO, AOTUnpaired, Quantity
from tests.helpers.trl_stubs import POLICY, REFERENCE, assert_same_loss_and_gradient, trl_dpo

COLLISIONS = [
    [-0.9, -1.5, -0.45, -1.2],
    [-1.3, -0.9, -1.2, -0.45, -1.1, -1.4],
    [-0.5, -0.75],
    [-0.25, -0.5, -0.25, -0.5, -0.25],
    [-0.6],
    [-0.7, -0.9, -0.6],
]
"""The mean log-prob is above the mean collision in the first and last pair's completions, and below in the second's."""


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo(inputs, alpha):
    step = inputs(POLICY, REFERENCE)
    ours = LDDPO(beta=0.4, alpha=alpha)(step).losses.mean()
    assert_same_loss_and_gradient(ours, trl_dpo(step, "sigmoid", 0.4, ld_alpha=alpha)[0], step.policy.values)


def test_ld_dpo_without_alpha_is_dpo(inputs):
    """TRL's alpha left out, against a loss that is the same in both."""
    step = inputs(POLICY, REFERENCE)
    ours = DPO(beta=0.4, label_smoothing=0.0)(step).losses.mean()
    assert_same_loss_and_gradient(ours, trl_dpo(step, "sigmoid", 0.4)[0], step.policy.values)


def test_wpo_has_no_limit_in_trl(inputs, ragged):
    """Pair by pair: the same loss where the weight is below 1, and that times the weight where it is above."""
    step = inputs(POLICY, REFERENCE, quantities={Quantity.collision: ragged(COLLISIONS)})
    output = WPO(beta=0.4)(step)
    above = (step.policy.values.detach() - step.quantities[Quantity.collision].values).tensor_split(
        step.policy.offsets[1:-1]
    )
    means = torch.stack([tokens.mean() for tokens in above])
    weights = (means[0::2] + means[1::2]).exp().tolist()
    assert [weight > 1 for weight in weights] == [True, False, False]
    for i, weight in enumerate(weights):
        theirs = trl_dpo(step, "sigmoid", 0.4, use_weighting=True, pairs=[i])[0]
        assert_same_loss_and_gradient(max(weight, 1.0) * output.losses[i], theirs, step.policy.values)


@pytest.mark.parametrize(("kind", "name"), [(AOT, "aot"), (AOTUnpaired, "aot_unpaired")])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aot(inputs, kind, name, smoothing):
    step = inputs(POLICY, REFERENCE)
    ours = kind(beta=0.4, label_smoothing=smoothing)(step).losses.mean()
    assert_same_loss_and_gradient(ours, trl_dpo(step, name, 0.4, label_smoothing=smoothing)[0], step.policy.values)
    dpo = DPO(beta=0.4, label_smoothing=smoothing)(step).losses.mean()
    assert abs((ours - dpo).item()) > 1e-3


@pytest.mark.parametrize(("kind", "name"), [(AOT, "aot"), (AOTUnpaired, "aot_unpaired")])
def test_aot_sorts_micro_batches_in_trl(inputs, kind, name):
    """Three pairs as two and one are another loss there; here a step's loss is that of all its pairs."""
    step = inputs(POLICY, REFERENCE)
    ours = kind(beta=0.4, label_smoothing=0.0)(step).losses.mean().item()
    split = (2 * trl_dpo(step, name, 0.4, pairs=[1, 2])[0].item() + trl_dpo(step, name, 0.4, pairs=[0])[0].item()) / 3
    assert abs(split - ours) > 1e-3
