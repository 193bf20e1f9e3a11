"""AOT: sorted against sorted, over the whole step."""

from itertools import permutations
from math import exp, log, nan

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import AOT, DPO, AOTUnpaired

BETA = 0.8

POLICY = [[-0.5, -0.5], [-2.0], [-3.0], [-1.0], [-0.5], [-0.5, -0.5]]
REFERENCE = [[-1.0, -0.5], [-1.75], [-0.5], [-2.0], [-2.0], [-0.5, -0.5]]
"""Margins of three pairs under the policy: 1, -2, 0.5; under the reference: 0.25, 1.5, -1. Log-ratios of the chosen:
0.5, -2.5, 1.5; of the rejected: -0.25, 1, 0."""

every_kind = pytest.mark.parametrize("kind", [AOT, AOTUnpaired])


def s(x):
    return 1 / (1 + exp(-x))


def value(z, smoothing=0.0):
    return (1 - smoothing) * log(1 + exp(-z)) + smoothing * log(1 + exp(z))


def weight(z, smoothing=0.0):
    return BETA * (s(-z) - smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_paired_by_hand(inputs, gradients, smoothing):
    """In order the policy's margins are -2, 0.5, 1 and the reference's -1, 0.25, 1.5: differences -1, 0.25, -0.5."""
    step = inputs(POLICY, REFERENCE)
    output = AOT(beta=BETA, label_smoothing=smoothing)(step)
    z = [BETA * difference for difference in (-0.5, -1.0, 0.25)]
    assert output.losses.tolist() == pytest.approx([value(x, smoothing) for x in z], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([BETA * r for r in (0.5, -0.25, -2.5, 1, 1.5, 0)], rel=1e-12)
    found = gradients(output.losses, step)
    for i, x in enumerate(z):
        assert found[2 * i] == pytest.approx([-weight(x, smoothing)] * len(POLICY[2 * i]), rel=1e-12)
        assert found[2 * i + 1] == pytest.approx([weight(x, smoothing)] * len(POLICY[2 * i + 1]), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_unpaired_by_hand(inputs, gradients, smoothing):
    """In order the chosen are -2.5, 0.5, 1.5 and the rejected -0.25, 0, 1: the first pair's chosen meets the third's
    rejected, the second's the first's, the third's the second's."""
    step = inputs(POLICY, REFERENCE)
    output = AOTUnpaired(beta=BETA, label_smoothing=smoothing)(step)
    z = [BETA * difference for difference in (0.5 - 0, -2.5 + 0.25, 1.5 - 1)]
    assert output.losses.tolist() == pytest.approx([value(x, smoothing) for x in z], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([BETA * r for r in (0.5, -0.25, -2.5, 1, 1.5, 0)], rel=1e-12)
    found = gradients(output.losses, step)
    for i, rejected in enumerate((2, 0, 1)):
        assert found[2 * i] == pytest.approx([-weight(z[i], smoothing)] * len(POLICY[2 * i]), rel=1e-12)
        expected = [weight(z[i], smoothing)] * len(POLICY[2 * rejected + 1])
        assert found[2 * rejected + 1] == pytest.approx(expected, rel=1e-12)


def random_step(inputs, pairs, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (2 * pairs,), generator=generator).tolist()

    def draw():
        return [(-2 * torch.rand(n, generator=generator, dtype=torch.float64)).tolist() for n in lengths]

    return inputs(draw(), draw(), **more)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_order_is_the_optimal_transport(inputs, smoothing):
    """Of all 120 ways to match five with five, that of the loss costs least: the cost is convex in the difference."""
    step = random_step(inputs, 5, seed=1)
    policy, reference = step.policy.sums().tolist(), step.reference.sums().tolist()
    margins, before = ([x[2 * i] - x[2 * i + 1] for i in range(5)] for x in (policy, reference))
    ratios = [p - r for p, r in zip(policy, reference, strict=True)]
    for kind, left, right in ((AOT, margins, before), (AOTUnpaired, ratios[0::2], ratios[1::2])):
        costs = [
            sum(value(BETA * (x - y), smoothing) for x, y in zip(left, order, strict=True))
            for order in permutations(right)
        ]
        found = kind(beta=BETA, label_smoothing=smoothing)(step).losses.sum().item()
        assert found == pytest.approx(min(costs), rel=1e-12)
        assert max(costs) > 1.01 * min(costs)


@every_kind
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_pair_alone_is_dpo(inputs, kind, smoothing):
    for first in (0, 2, 4):
        step = inputs(POLICY[first : first + 2], REFERENCE[first : first + 2])
        ours, dpo = (k(beta=BETA, label_smoothing=smoothing)(step) for k in (kind, DPO))
        assert ours.losses.item() == pytest.approx(dpo.losses.item(), rel=1e-14)


@every_kind
def test_the_order_of_the_pairs_does_not_matter(inputs, kind):
    loss = kind(beta=BETA, label_smoothing=0.0)
    values = set()
    for order in permutations(range(3)):
        sequences = [s for i in order for s in (2 * i, 2 * i + 1)]
        step = inputs(*([given[j] for j in sequences] for given in (POLICY, REFERENCE)))
        output = loss(step)
        values.add(round(output.losses.mean().item(), 14))
        assert output.losses.tolist() == pytest.approx(loss(inputs(POLICY, REFERENCE)).losses[list(order)].tolist())
    assert len(values) == 1


def test_is_dpo_where_policy_and_reference_rank_the_pairs_alike(inputs):
    """And not elsewhere: the three pairs are ranked 1, 2, 0 by the policy and 2, 0, 1 by the reference."""
    dpo, aot = (kind(beta=BETA, label_smoothing=0.0) for kind in (DPO, AOT))
    alike = inputs([[-0.5], [-2.0], [-1.0], [-1.0]], [[-0.5], [-1.0], [-2.5], [-0.5]])
    torch.testing.assert_close(aot(alike).losses, dpo(alike).losses, rtol=1e-14, atol=0)
    step = inputs(POLICY, REFERENCE)
    assert abs((aot(step).losses.mean() - dpo(step).losses.mean()).item()) > 0.1


@every_kind
def test_a_split_step_is_another_loss(inputs, kind):
    """Sorting within parts, which is what happens where each micro-batch is sorted by itself."""
    loss = kind(beta=BETA, label_smoothing=0.0)
    assert loss.requirements().whole_step
    parts = [loss(inputs(POLICY[a:b], REFERENCE[a:b])).losses.sum().item() for a, b in ((0, 2), (2, 6))]
    assert abs(sum(parts) - loss(inputs(POLICY, REFERENCE)).losses.sum().item()) > 0.05


def test_the_sum_of_the_margins_is_that_of_the_rewards(inputs):
    """For margins so small that the loss is a straight line, the mean loss tells their sum."""
    step = random_step(inputs, 6, seed=2)
    beta = 1e-6
    output = AOT(beta=beta, label_smoothing=0.0)(step)
    margins = (output.rewards[0::2] - output.rewards[1::2]).sum().item()
    assert 2 * (6 * log(2) - output.losses.sum().item()) == pytest.approx(margins, rel=1e-5)


@every_kind
def test_at_the_start_every_pair_has_the_same_weight(inputs, gradients, kind):
    """All log-ratios are 0, tied: the ranks do not matter then."""
    step = inputs(REFERENCE, REFERENCE)
    output = kind(beta=BETA, label_smoothing=0.0)(step)
    assert output.losses.tolist() == pytest.approx([log(2)] * 3, rel=1e-15)
    assert {abs(g) for sequence in gradients(output.losses, step) for g in sequence} == {BETA / 2}


def test_long_completions_keep_their_small_margins_in_float32(inputs):
    """Sums of 1000 nats are multiples of 6e-5: their difference would lose a log-ratio of 1e-4 per pair."""
    reference = [[-1.0] * n for n in (1000, 700, 900, 1100, 1300, 1000)]
    policy = [[-1.0 + 1e-4 * (-1) ** i, *row[1:]] for i, row in enumerate(reference)]
    step = inputs(policy, reference, dtype=torch.float32)
    losses = AOT(beta=1000.0, label_smoothing=0.0)(step).losses
    assert losses.tolist() == pytest.approx([value(1000 * 2e-4)] * 3, rel=1e-3)


@every_kind
@pytest.mark.parametrize(
    ("key", "values"), [("beta", [0.0, -1.0, float("inf"), nan]), ("label_smoothing", [-0.1, 0.5, nan])]
)
def test_refuses(kind, key, values):
    for wrong in values:
        with pytest.raises(UserError, match=rf"loss\.{key} must be"):
            kind(**{"beta": 0.1, "label_smoothing": 0.0} | {key: wrong})
