"""Losses that weigh pairs: by scores (ODPO, soft SPPO) and by the reference's entropy (MallowsPO)."""

from dataclasses import replace
from math import exp, inf, log, nan

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import DPO, ODPO, SPPO, MallowsPO, Quantity, SPPOSoft


def s(x):
    return 1 / (1 + exp(-x))


def sp(x):
    return log(1 + exp(x))


U_AND_V = {"prefers the chosen": (0.75, -1.5), "prefers the rejected": (-1.5, 1.75)}


def pair(inputs, name, scores=None, dtype=torch.float64):
    """One pair of 2 and 3 tokens with those log-ratios."""
    u, v = U_AND_V[name]
    step = inputs([[u - 1.0, -1.0], [-1.0, v - 0.5, -0.25]], [[-1.0, -1.0], [-1.0, -0.5, -0.25]], dtype=dtype)
    return replace(step, scores=None if scores is None else torch.tensor(scores, dtype=torch.float64)), u, v


def check(output, step, gradients, value, weights, rewards):
    assert output.losses.tolist() == pytest.approx([value], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx(rewards, rel=1e-12)
    chosen, rejected = gradients(output.losses, step)
    assert chosen == pytest.approx([-weights[0]] * 2, rel=1e-11)
    assert rejected == pytest.approx([weights[1]] * 3, rel=1e-11)


@pytest.mark.parametrize("name", U_AND_V)
@pytest.mark.parametrize("scores", [(4.5, 3.0), (0.25, 0.0), (-1.0, -7.0)])
def test_odpo(inputs, gradients, name, scores):
    """Gaps 1.5, 0.25 and 6: the second asks for a smaller margin than DPO."""
    step, u, v = pair(inputs, name, scores)
    output = ODPO(beta=0.4, alpha=0.7)(step)
    offset = 0.7 * log(scores[0] - scores[1])
    weight = 0.4 * s(offset - 0.4 * (u - v))
    check(output, step, gradients, sp(offset - 0.4 * (u - v)), (weight, weight), (0.4 * u, 0.4 * v))
    assert output.parts["offset"].tolist() == pytest.approx([offset], rel=1e-14)


@pytest.mark.parametrize("name", U_AND_V)
def test_odpo_with_a_gap_of_1_is_dpo(inputs, name):
    step, _, _ = pair(inputs, name, (3.0, 2.0))
    assert torch.equal(ODPO(beta=0.4, alpha=0.7)(step).losses, DPO(beta=0.4, label_smoothing=0.0)(step).losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", U_AND_V)
def test_odpo_learns_nothing_from_equal_scores(inputs, gradients, name, dtype):
    """The formula's limit: 0 with a gradient of 0, whatever the margin; close to it the loss is close to 0."""
    step, _, _ = pair(inputs, name, (2.0, 2.0), dtype)
    loss = ODPO(beta=0.4, alpha=0.7)
    losses = loss(step).losses
    assert losses.tolist() == [0.0]
    assert gradients(losses, step) == [[0.0] * 2, [0.0] * 3]
    assert loss.at_reference(step).tolist() == [0.0]
    assert 0 < loss(pair(inputs, name, (2.0 + 1e-9, 2.0))[0]).losses.item() < 1e-5


def test_odpo_refuses_a_lower_score_of_the_chosen_answer(inputs):
    step, _, _ = pair(inputs, "prefers the chosen", (2.0, 2.5))
    loss = ODPO(beta=0.4, alpha=0.7)
    for compute in (loss, loss.at_reference):
        with pytest.raises(ValueError, match="scores are not below"):
            compute(step)
    assert loss.problem(2, (2.0, 2.5)) == "scores its chosen completion 0.5 lower than its rejected one"
    assert loss.problem(2, (2.5, 2.5)) is None and loss.problem(2, (2.5, 2.0)) is None


@pytest.mark.parametrize("name", U_AND_V)
@pytest.mark.parametrize("scores", [(2.0, 0.5), (0.5, 0.5), (-1.0, 1.0)])
def test_sppo_soft(inputs, gradients, name, scores):
    """P = S(1.5 gap): above, at and below 1/2. A lower score of the chosen answer pulls the pair the other way."""
    step, u, v = pair(inputs, name, scores)
    output = SPPOSoft(beta=0.1, score_scale=1.5)(step)
    win_rate = s(1.5 * (scores[0] - scores[1]))
    target = (win_rate - 0.5) / 0.1
    value = (u - target) ** 2 / 2 + (v + target) ** 2 / 2
    check(output, step, gradients, value, (target - u, v + target), (0.1 * u, 0.1 * v))
    assert output.parts["win_rate"].tolist() == pytest.approx([win_rate], rel=1e-14)


def test_sppo_soft_by_hand(inputs):
    """Scores log 3 apart: P = 3/4, so the log-ratios are fitted to 1/4 over beta 1/8, that is 2 and -2."""
    step, _, _ = pair(inputs, "prefers the chosen", (log(3), 0.0))
    loss = SPPOSoft(beta=0.125, score_scale=1.0)
    assert loss(step).losses.item() == pytest.approx(((0.75 - 2) ** 2 + (-1.5 + 2) ** 2) / 2, rel=1e-13)
    assert loss.at_reference(step).tolist() == pytest.approx([4.0], rel=1e-13)


@pytest.mark.parametrize("name", U_AND_V)
def test_sppo_soft_with_a_certain_win_is_sppo(inputs, name):
    step, _, _ = pair(inputs, name, (100.0, 0.0))
    soft, hard = SPPOSoft(beta=0.1, score_scale=1.0)(step), SPPO(beta=0.1)(step)
    torch.testing.assert_close(soft.losses, hard.losses, rtol=1e-14, atol=0)
    assert torch.equal(soft.rewards, hard.rewards)


def with_entropies(step, ragged, entropies):
    return replace(step, quantities={Quantity.entropy: ragged(entropies, step.policy.values.dtype)})


ENTROPIES = [[0.25, 0.35], [0.9, 0.5, 0.1]]
"""Means 0.3 and 0.5, on average 0.4; over all five tokens the mean would be 0.42."""


@pytest.mark.parametrize("name", U_AND_V)
def test_mallows_po(inputs, ragged, gradients, name):
    step, u, v = pair(inputs, name)
    output = MallowsPO(beta=0.4, dispersion=0.29)(with_entropies(step, ragged, ENTROPIES))
    phi = -0.29 * log(0.4)
    weight = 0.4 * phi * s(-0.4 * phi * (u - v))
    check(output, step, gradients, sp(-0.4 * phi * (u - v)), (weight, weight), (0.4 * phi * u, 0.4 * phi * v))
    assert output.parts["phi"].tolist() == pytest.approx([phi], rel=1e-14)


def test_mallows_po_by_hand(inputs, ragged):
    """An entropy of 1/e and c = log 3 / beta / (u - v): the margin is log 3, the loss log(4/3); swapped, log 4."""
    for u, v, expected in ((2.0, 0.0, 4 / 3), (0.0, 2.0, 4.0)):
        step = inputs([[u - 3.0], [v - 3.0]], [[-3.0], [-3.0]])
        loss = MallowsPO(beta=0.5, dispersion=log(3))
        assert loss(with_entropies(step, ragged, [[exp(-1)]] * 2)).losses.item() == pytest.approx(log(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("entropy", "phi"), [(0.0, -0.29 * log(1e-6)), (1.0, 0.0), (1.0000001, 0.0)])
def test_mallows_po_where_the_reference_is_certain_or_at_a_loss(inputs, ragged, gradients, dtype, entropy, phi):
    step, _, _ = pair(inputs, "prefers the rejected", dtype=dtype)
    output = MallowsPO(beta=0.4, dispersion=0.29)(with_entropies(step, ragged, [[entropy] * 2, [entropy] * 3]))
    assert output.parts["phi"].tolist() == pytest.approx([phi], rel=1e-6)
    assert output.losses.isfinite().all()
    assert torch.tensor(gradients(output.losses, step)[0]).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "valid", "key", "values"),
    [
        (ODPO, {"beta": 0.1, "alpha": 1.0}, "beta", [0.0, inf, nan]),
        (ODPO, {"beta": 0.1, "alpha": 1.0}, "alpha", [0.0, -0.1, inf, nan]),
        (SPPOSoft, {"beta": 0.1, "score_scale": 1.0}, "beta", [0.0, inf, nan]),
        (SPPOSoft, {"beta": 0.1, "score_scale": 1.0}, "score_scale", [0.0, -0.1, inf, nan]),
        (MallowsPO, {"beta": 0.1, "dispersion": 0.29}, "beta", [0.0, inf, nan]),
        (MallowsPO, {"beta": 0.1, "dispersion": 0.29}, "dispersion", [0.0, -0.1, inf, nan]),
    ],
)
def test_refuses(kind, valid, key, values):
    kind(**valid)
    for value in values:
        with pytest.raises(UserError, match=rf"^loss\.{key} must be .*, not .*\.$"):
            kind(**valid | {key: value})
