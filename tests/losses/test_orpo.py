"""ORPO against values worked out by hand, and its numerics next to probability 1."""

from math import log

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import ORPO
from alignment.losses.orpo import log_odds
from tests.helpers.loss_examples import SEQUENCES


@pytest.mark.parametrize(
    ("pair", "lam", "loss", "weights", "odds"),
    [
        # p_w = 1/2 (tokens 1/4 and 1), p_l = 1/3 (tokens 1/3, 1/3, 1/9, 1): odds 1 and 1/2, w = log 2.
        # L = log 2 + 1/2 log(1 + 1/2); S(-w) = 1/3.
        # G_w = 1/2 + 1/2 (1/3) / (1/2 * 2) = 2/3; G_l = 1/2 (1/3) / (2/3 * 4) = 1/16.
        (
            [[log(1 / 4), 0.0], [log(1 / 3), log(1 / 3), log(1 / 9), 0.0]],
            0.5,
            log(2) + 0.5 * log(3 / 2),
            (2 / 3, 1 / 16),
            (1, 1 / 2),
        ),
        # p_w = 1/5, p_l = 3/4: odds 1/4 and 3, w = -log 12; L = log 5 + 1/2 log(1 + 12); S(-w) = 12/13.
        # G_w = 1/2 + 1/2 (12/13) / (4/5 * 2) = 1/2 + 15/52; G_l = 1/2 (12/13) / (1/4 * 4) = 6/13.
        (
            [[log(1 / 5), log(1 / 5)], [log(9 / 16), 0.0, log(9 / 16), 0.0]],
            0.5,
            log(5) + 0.5 * log(13),
            (41 / 52, 6 / 13),
            (1 / 4, 3),
        ),
        # lam = 0 is SFT on the chosen completion alone.
        ([[log(1 / 5), log(1 / 5)], [log(9 / 16), 0.0, log(9 / 16), 0.0]], 0.0, log(5), (1 / 2, 0), (1 / 4, 3)),
    ],
)
def test_by_hand(inputs, gradients, pair, lam, loss, weights, odds):
    step = inputs(pair)
    output = ORPO(lam=lam, **SEQUENCES)(step)
    assert output.losses.tolist() == pytest.approx([loss], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx([log(o) for o in odds], abs=1e-12)
    assert output.parts["nll"].tolist() == pytest.approx([-sum(pair[0]) / 2], rel=1e-12)
    assert output.parts["log_odds"].tolist() == pytest.approx([log(odds[0] / odds[1])], rel=1e-12)
    chosen, rejected = gradients(output.losses, step)
    assert chosen == pytest.approx([-weights[0]] * 2, rel=1e-12)
    assert rejected == pytest.approx([weights[1]] * 4, rel=1e-12)


@pytest.mark.parametrize("mean", [-1e-8, -3e-8, -1e-7, -1e-5, -1e-3, -0.1, -0.6931, -0.6932, -1.0, -20.0, -88.0, -1e4])
def test_log_odds_in_float32(mean):
    """Value and derivative 1 / (1 - p) against float64 at the same float32 number, all over the range."""
    x = torch.tensor(mean, dtype=torch.float32, requires_grad=True)
    exact = x.item()
    value = log_odds(x)
    (slope,) = torch.autograd.grad(value, x)
    one_minus_p = -torch.expm1(torch.tensor(exact, dtype=torch.float64))
    assert value.item() == pytest.approx(exact - torch.log(one_minus_p).item(), rel=1e-6, abs=2e-7)
    assert slope.item() == pytest.approx(1 / one_minus_p.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 1e-7])
def test_log_odds_at_certainty(dtype, mean):
    """At p = 1, and where rounding lifts a mean above 0: finite, and still rising."""
    x = torch.tensor(mean, dtype=dtype, requires_grad=True)
    value = log_odds(x)
    (slope,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(-log(1e-10), rel=1e-6)
    assert slope.item() == 1.0


@pytest.mark.parametrize("chosen", [-1e-8, 0.0, -1.0])
@pytest.mark.parametrize("rejected", [-1e-8, 0.0, -1.0])
def test_gradient_at_certainty_in_float32(inputs, gradients, chosen, rejected):
    """Finite and of the right sign: chosen up, rejected down, also where a completion is certain already."""
    step = inputs([[chosen] * 3, [rejected] * 2], dtype=torch.float32)
    output = ORPO(lam=0.1, **SEQUENCES)(step)
    assert torch.isfinite(output.losses).all()
    chosen_tokens, rejected_tokens = map(torch.tensor, gradients(output.losses, step))
    assert torch.isfinite(chosen_tokens).all()
    assert torch.isfinite(rejected_tokens).all()
    assert (chosen_tokens < 0).all()
    assert (rejected_tokens > 0).all()


@pytest.mark.parametrize("lam", [-0.1, float("nan"), float("inf")])
def test_refuses_lam(lam):
    with pytest.raises(UserError, match=r"loss\.lam must be"):
        ORPO(lam=lam, **SEQUENCES)
