"""The landscape of a loss against gradients that are written out by hand, and against the loss on a whole step."""

import math

import pytest
import torch

from alignment.course.landscape import Landscape, PairUnderReference, along_margin, landscape, plane
from alignment.errors import UserError
from alignment.losses import LOSSES, Mixture, Quantity
from alignment.losses.orpo import log_odds
from tests.conftest import recommended_loss

PAIR = PairUnderReference(chosen_tokens=4, rejected_tokens=8, chosen_logp=-1.5, rejected_logp=-1.0)
EVEN = PairUnderReference(chosen_tokens=10, rejected_tokens=10, chosen_logp=-2.0, rejected_logp=-2.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def at(name: str, u: float, v: float, *settings: str) -> tuple[float, float, float]:
    point = landscape(recommended_loss(name, *settings), torch.tensor([u]), torch.tensor([v]), PAIR)
    return point.losses.item(), point.push_up.item(), point.push_down.item()


def test_dpo_pushes_both_answers_alike_and_less_the_larger_the_margin():
    weight = 0.5 * sigmoid(-0.5 * 3)
    assert at("dpo", 1.0, -2.0, "beta=0.5") == pytest.approx((-math.log(sigmoid(1.5)), weight, weight))
    wrong = 0.5 * sigmoid(0.5 * 3)
    assert at("dpo", -2.0, 1.0, "beta=0.5")[1:] == pytest.approx((wrong, wrong))


def test_ipo_pulls_back_beyond_its_target():
    # Means: h = 4/4 - (-8)/8 = 2 beyond a target of 1 / (2 * 0.5) = 1; each side by its own length.
    assert at("ipo", 4.0, -8.0, "tau=0.5") == pytest.approx((1.0, -2 / 4, -2 / 8))


def test_simpo_looks_at_the_policy_alone():
    # a = -1.5 + 2/4 = -1, b = -1 - 4/8 = -1.5; beta 2, gamma 1: beta (a - b) - gamma = 0.
    assert at("simpo", 2.0, -4.0) == pytest.approx((math.log(2), 2 * 0.5 / 4, 2 * 0.5 / 8))


def test_kto_is_two_rows_and_forgets_those_that_are_far_off():
    # Baseline 0: 1 - S(beta u) and 1 - S(-beta v).
    up, down = (0.5 * sigmoid(0.5 * x) * sigmoid(-0.5 * x) for x in (1.0, -2.0))
    loss = 1 - sigmoid(0.5) + 1 - sigmoid(1.0)
    assert at("kto", 1.0, -2.0, "beta=0.5") == pytest.approx((loss, up, down))
    assert at("kto", -5.5, 5.5, "beta=2")[1] < 1e-4


def test_orpo_holds_the_chosen_answer_whatever_the_margin():
    a, b = -1.5 + 2 / 4, -1.0 - 2 / 8
    p, q = math.exp(a), math.exp(b)
    odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    assert log_odds(torch.tensor(a)).item() == pytest.approx(math.log(p / (1 - p)), rel=1e-5)
    lost = 0.1 * sigmoid(-odds)
    expected = (-a - 0.1 * math.log(sigmoid(odds)), (1 + lost / (1 - p)) / 4, lost / (1 - q) / 8)
    assert at("orpo", 2.0, -2.0) == pytest.approx(expected)


def test_no_log_prob_is_above_zero():
    both = landscape(recommended_loss("dpo"), torch.tensor([5.9, 6.1]), torch.tensor([0.0, 0.0]), PAIR)
    assert torch.isfinite(both.losses).tolist() == [True, False]
    assert torch.isfinite(both.push_up).tolist() == torch.isfinite(both.push_down).tolist() == [True, False]


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {Mixture.name}))
def test_every_loss_has_one_or_says_why_not(name):
    """Pushes are the differences of the loss; a point's value does not depend on what other points are looked at."""
    loss = recommended_loss(name)
    u, v = torch.tensor([0.7, -3.0, 4.1]).double(), torch.tensor([-1.3, 2.0, 0.4]).double()
    if loss.requirements().quantities or name in ("tpo", "tpo_l", "opd"):
        with pytest.raises(UserError, match=f"Loss {name} reads more"):
            landscape(loss, u, v, EVEN)
        return
    whole = landscape(loss, u, v, EVEN)
    assert whole.losses.shape == (3,)
    one = landscape(loss, u[1:2], v[1:2], EVEN)
    assert one.losses.item() == pytest.approx(whole.losses[1].item(), rel=1e-12)
    if name == "beta_dpo":
        return  # its beta follows the pairs and is held fixed in the gradient
    step = 1e-6

    def slope(du: float, dv: float) -> torch.Tensor:
        ahead, behind = (landscape(loss, u + s * du, v + s * dv, EVEN).losses for s in (step, -step))
        return (ahead - behind) / (2 * step)

    torch.testing.assert_close(whole.push_up, -slope(1, 0), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(whole.push_down, slope(0, 1), rtol=1e-5, atol=1e-8)


def test_a_step_of_several_copies_is_one_pair():
    assert recommended_loss("beta_dpo").requirements().min_items == 2
    assert at("beta_dpo", 0.0, 0.0) == pytest.approx((math.log(2), 0.05, 0.05))


def test_quantities_are_named_by_the_losses_that_have_no_landscape():
    asked = {n: recommended_loss(n).requirements().quantities for n in LOSSES if n != "mixture"}
    assert {n for n in asked if asked[n]} == {"mallows_po", "tdpo1", "tdpo2", "tropd", "wpo"}
    assert set().union(*asked.values()) == set(Quantity)


def test_along_the_margin_and_over_the_plane():
    dpo = recommended_loss("dpo")
    line = along_margin(dpo, torch.tensor([-4.0, 0.0, 2.0]), EVEN)
    assert (line.chosen - line.rejected).tolist() == [-4.0, 0.0, 2.0]
    assert (line.chosen + line.rejected).tolist() == [0.0] * 3
    found: Landscape = plane(dpo, torch.tensor([0.0, 1.0, 2.0]), torch.tensor([-1.0, 1.0]), EVEN)
    assert found.chosen.tolist() == [0.0, 1.0, 2.0] * 2
    assert found.rejected.tolist() == [-1.0] * 3 + [1.0] * 3
    assert found.losses[2].item() == pytest.approx(math.log1p(math.exp(-0.3)))
