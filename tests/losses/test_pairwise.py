"""Closed-form losses of pairs: value and gradient against formulas written out with plain numbers."""

from dataclasses import dataclass
from math import exp, inf, log, nan

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import (
    DPO,
    DPOP,
    EXO,
    FDPO,
    GPO,
    LNDPO,
    NCA,
    RDPO,
    SPPO,
    AlphaPO,
    APODown,
    APOZero,
    BCOPair,
    CalDPO,
    DiscoPOP,
    Hinge,
    RePO,
    RobustDPO,
    SimPO,
    SLiCHF,
)
from alignment.losses.f_dpo import Divergence
from alignment.losses.gpo import Shape


@dataclass
class Pair:
    """Per-token log-probs of a chosen and a rejected completion, and the sums that formulas are written in."""

    policy: list
    reference: list

    def __post_init__(self):
        self.a, self.b = map(sum, self.policy)
        self.n_w, self.n_l = map(len, self.policy)
        self.u, self.v = self.a - sum(self.reference[0]), self.b - sum(self.reference[1])
        self.d = self.u - self.v


PAIRS = {
    "prefers the chosen": Pair([[-0.5, -1.0, -0.25], [-1.0, -2.5]], [[-0.75, -1.25, -0.5], [-0.5, -1.5]]),
    "prefers the rejected": Pair([[-2.0, -1.5], [-0.25, -0.5, -0.25]], [[-1.0, -1.0], [-0.75, -1.5, -0.5]]),
    "both more likely": Pair([[-0.5], [-0.25, -0.75, -0.5, -0.5]], [[-1.5], [-1.0, -1.0, -0.75, -0.5]]),
    "both less likely": Pair([[-1.0, -3.0, -1.5], [-2.5, -0.5]], [[-0.5, -1.0, -1.0], [-0.25, -0.25]]),
}
"""u and v are 0.75 and -1.5; -1.5 and 1.75; 1 and 1.25; -3 and -2.5."""


def s(x):
    return 1 / (1 + exp(-x))


def sp(x):
    return log(1 + exp(x))


def sigma(x):
    return s(x) * s(-x)


def dpop_argument(p):
    return 0.5 * (p.d - 3 * max(0, -p.u))


def disco(p):
    z = 0.4 * p.d
    m = s(z / 0.25)
    slope = (1 - m) * s(-z) + m * exp(-z) + m * (1 - m) / 0.25 * (sp(-z) - exp(-z))
    return (1 - m) * sp(-z) + m * exp(-z), 0.4 * slope


def alpha_reward(m):
    return 2 * (1 - exp(-0.5 * m)) / 0.5


def alpha_excess(p):
    return 0.6 - alpha_reward(p.a / p.n_w) + alpha_reward(p.b / p.n_l)


def divergence(g, slope):
    def value(p):
        return sp(-(g(p.u) - g(p.v)) * 0.4)

    def weights(p):
        rest = 0.4 * s(-(g(p.u) - g(p.v)) * 0.4)
        return rest * slope(p.u), rest * slope(p.v)

    return value, weights


def both(weight):
    return lambda p: (weight(p), weight(p))


CASES = {
    "robust_dpo": (
        RobustDPO(beta=0.4, flip_rate=0.2),
        lambda p: (0.8 * sp(-0.4 * p.d) - 0.2 * sp(0.4 * p.d)) / 0.6,
        both(lambda p: 0.4 * (0.8 * s(-0.4 * p.d) + 0.2 * s(0.4 * p.d)) / 0.6),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "hinge": (
        Hinge(beta=0.5),
        lambda p: max(0, 1 - 0.5 * p.d),
        both(lambda p: 0.5 if 0.5 * p.d < 1 else 0),
        lambda p: (0.5 * p.u, 0.5 * p.v),
    ),
    "gpo_squared": (
        GPO(beta=0.4, shape=Shape.squared),
        lambda p: (1 - 0.4 * p.d) ** 2,
        both(lambda p: 0.8 * (1 - 0.4 * p.d)),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "gpo_exponential": (
        GPO(beta=0.4, shape=Shape.exponential),
        lambda p: exp(-0.4 * p.d),
        both(lambda p: 0.4 * exp(-0.4 * p.d)),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "gpo_truncated_quadratic": (
        GPO(beta=0.6, shape=Shape.truncated_quadratic),
        lambda p: max(0, 1 - 0.6 * p.d) ** 2,
        both(lambda p: 1.2 * max(0, 1 - 0.6 * p.d)),
        lambda p: (0.6 * p.u, 0.6 * p.v),
    ),
    "gpo_savage": (
        GPO(beta=0.4, shape=Shape.savage),
        lambda p: 1 / (1 + exp(0.4 * p.d)) ** 2,
        both(lambda p: 0.4 * 2 * s(-0.4 * p.d) ** 2 * s(0.4 * p.d)),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "ln_dpo": (
        LNDPO(beta=3.0),
        lambda p: sp(-3 * (p.u / p.n_w - p.v / p.n_l)),
        lambda p: tuple(3 * s(-3 * (p.u / p.n_w - p.v / p.n_l)) / n for n in (p.n_w, p.n_l)),
        lambda p: (3 * p.u / p.n_w, 3 * p.v / p.n_l),
    ),
    "r_dpo": (
        RDPO(beta=0.4, alpha=0.3),
        lambda p: sp(-(0.4 * p.d + 0.3 * (p.n_w - p.n_l))),
        both(lambda p: 0.4 * s(-(0.4 * p.d + 0.3 * (p.n_w - p.n_l)))),
        lambda p: (0.4 * p.u + 0.3 * p.n_w, 0.4 * p.v + 0.3 * p.n_l),
    ),
    "dpop": (
        DPOP(beta=0.5, lam=3.0),
        lambda p: sp(-dpop_argument(p)),
        lambda p: (0.5 * s(-dpop_argument(p)) * (4 if p.u < 0 else 1), 0.5 * s(-dpop_argument(p))),
        lambda p: (0.5 * (p.u - 3 * max(0, -p.u)), 0.5 * p.v),
    ),
    "cal_dpo": (
        CalDPO(beta=0.25),
        lambda p: sp(-p.d) + (p.u - 2) ** 2 + (p.v + 2) ** 2,
        lambda p: (s(-p.d) + 4 - 2 * p.u, s(-p.d) + 4 + 2 * p.v),
        lambda p: (p.u, p.v),
    ),
    "f_dpo_forward_kl": (
        FDPO(beta=0.4, divergence=Divergence.forward_kl, alpha=None),
        *divergence(lambda x: -exp(-x), lambda x: exp(-x)),
        lambda p: (-0.4 * exp(-p.u), -0.4 * exp(-p.v)),
    ),
    "f_dpo_jensen_shannon": (
        FDPO(beta=0.4, divergence=Divergence.jensen_shannon, alpha=None),
        *divergence(lambda x: -sp(-x), lambda x: s(-x)),
        lambda p: (-0.4 * sp(-p.u), -0.4 * sp(-p.v)),
    ),
    "f_dpo_alpha": (
        FDPO(beta=0.4, divergence=Divergence.alpha, alpha=0.3),
        *divergence(lambda x: (1 - exp(-0.3 * x)) / 0.3, lambda x: exp(-0.3 * x)),
        lambda p: tuple(0.4 * (1 - exp(-0.3 * x)) / 0.3 for x in (p.u, p.v)),
    ),
    "discopop": (
        DiscoPOP(beta=0.4, tau=0.25),
        lambda p: disco(p)[0],
        both(lambda p: disco(p)[1]),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "exo": (
        EXO(beta=0.4, epsilon=0.1),
        lambda p: s(0.4 * p.d) * log(s(0.4 * p.d) / 0.9) + s(-0.4 * p.d) * log(s(-0.4 * p.d) / 0.1),
        both(lambda p: 0.4 * sigma(0.4 * p.d) * (log(9) - 0.4 * p.d)),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "nca": (
        NCA(beta=0.8),
        lambda p: sp(-0.8 * p.u) + 0.5 * sp(0.8 * p.u) + 0.5 * sp(0.8 * p.v),
        lambda p: (0.8 * (s(-0.8 * p.u) - 0.5 * s(0.8 * p.u)), 0.4 * s(0.8 * p.v)),
        lambda p: (0.8 * p.u, 0.8 * p.v),
    ),
    "sppo": (
        SPPO(beta=0.25),
        lambda p: ((p.u - 2) ** 2 + (p.v + 2) ** 2) / 2,
        lambda p: (2 - p.u, p.v + 2),
        lambda p: (0.25 * p.u, 0.25 * p.v),
    ),
    "apo_zero": (
        APOZero(beta=0.4),
        lambda p: s(-0.4 * p.u) + s(0.4 * p.v),
        lambda p: (0.4 * sigma(0.4 * p.u), 0.4 * sigma(0.4 * p.v)),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "apo_down": (
        APODown(beta=0.4),
        lambda p: s(0.4 * p.u) + s(-0.4 * p.d),
        lambda p: (0.4 * (sigma(0.4 * p.d) - sigma(0.4 * p.u)), 0.4 * sigma(0.4 * p.d)),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "bco_pair": (
        BCOPair(beta=0.4),
        lambda p: sp(-0.4 * p.u) + sp(0.4 * p.v),
        lambda p: (0.4 * s(-0.4 * p.u), 0.4 * s(0.4 * p.v)),
        lambda p: (0.4 * p.u, 0.4 * p.v),
    ),
    "alphapo": (
        AlphaPO(beta=2.0, gamma_beta_ratio=0.3, alpha=0.5),
        lambda p: sp(alpha_excess(p)),
        lambda p: tuple(
            2 * s(alpha_excess(p)) * exp(-0.5 * total / n) / n for total, n in ((p.a, p.n_w), (p.b, p.n_l))
        ),
        lambda p: (alpha_reward(p.a / p.n_w), alpha_reward(p.b / p.n_l)),
    ),
    "repo": (
        RePO(gamma=0.5),
        lambda p: max(0, 0.5 - p.a / p.n_w + p.b / p.n_l),
        lambda p: tuple(1 / n if p.a / p.n_w - p.b / p.n_l < 0.5 else 0 for n in (p.n_w, p.n_l)),
        lambda p: (p.a / p.n_w, p.b / p.n_l),
    ),
    "slic_hf": (
        SLiCHF(delta=1.0, lam=0.2),
        lambda p: max(0, 1 - p.a + p.b) - 0.2 * p.a,
        lambda p: (1.2, 1) if p.a - p.b < 1 else (0.2, 0),
        lambda p: (p.a, p.b),
    ),
}
every_case = pytest.mark.parametrize(("loss", "value", "weights", "rewards"), CASES.values(), ids=CASES)


@every_case
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_by_formula(inputs, gradients, loss, value, weights, rewards, pair):
    """Value, the gradient at every token, and the rewards."""
    step = inputs(pair.policy, pair.reference)
    output = loss(step)
    assert output.losses.tolist() == pytest.approx([value(pair)], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx(rewards(pair), rel=1e-12)
    chosen, rejected = gradients(output.losses, step)
    g_w, g_l = weights(pair)
    assert chosen == pytest.approx([-g_w] * pair.n_w, rel=1e-11, abs=1e-14)
    assert rejected == pytest.approx([g_l] * pair.n_l, rel=1e-11, abs=1e-14)


def test_the_pairs_are_what_their_names_say():
    """So every branch is met: both sides of each hinge, of DPOP's, and of the signs of u, v and d."""
    assert [(p.u, p.v) for p in PAIRS.values()] == [(0.75, -1.5), (-1.5, 1.75), (1.0, 1.25), (-3.0, -2.5)]
    assert {0.6 * p.d < 1 for p in PAIRS.values()} == {0.5 * p.d < 1 for p in PAIRS.values()} == {True, False}
    assert {p.a / p.n_w - p.b / p.n_l < 0.5 for p in PAIRS.values()} == {p.a - p.b < 1 for p in PAIRS.values()}


def test_apo_down_lowers_an_unlikely_chosen_answer(inputs, gradients):
    """Where u is nearer to 0 than d is, the chosen completion loses too, as its paper wants."""
    pair = PAIRS["prefers the chosen"]
    loss = APODown(beta=1.0)
    step = inputs(pair.policy, pair.reference)
    chosen, rejected = gradients(loss(step).losses, step)
    assert min(chosen) > 0
    assert min(rejected) > 0


def test_discopop_pushes_small_margins_back(inputs, gradients):
    """At d = 0 the weight is beta (3/4 - (1 - log 2) / (4 tau)): -0.784 beta for tau 0.05, positive above 0.1023."""
    step = inputs([[-1.0], [-1.0]], [[-1.0], [-1.0]])
    for tau in (0.05, 0.102, 0.103, 0.5):
        expected = 0.3 * (0.75 - (1 - log(2)) / (4 * tau))
        assert (expected > 0) == (tau > 0.1025)
        chosen, _ = gradients(DiscoPOP(beta=0.3, tau=tau)(step).losses, step)
        assert chosen == pytest.approx([-expected], rel=1e-12)


def step_of(inputs, name):
    return inputs(PAIRS[name].policy, PAIRS[name].reference)


@pytest.mark.parametrize("name", PAIRS)
def test_members_of_one_family_agree(inputs, name):
    """What is the same by algebra under other names is the same number."""
    step = step_of(inputs, name)

    def value(loss):
        return loss(step).losses.item()

    dpo = value(DPO(beta=0.4, label_smoothing=0.0))
    assert value(RobustDPO(beta=0.4, flip_rate=0.0)) == pytest.approx(dpo, rel=1e-14)
    assert value(RDPO(beta=0.4, alpha=0.0)) == pytest.approx(dpo, rel=1e-14)
    assert value(DPOP(beta=0.4, lam=0.0)) == pytest.approx(dpo, rel=1e-14)
    almost = FDPO(beta=0.4, divergence=Divergence.alpha, alpha=1e-9)
    assert value(almost) == pytest.approx(dpo, rel=1e-7)
    simpo = value(SimPO(beta=2.0, gamma_beta_ratio=0.3))
    assert value(AlphaPO(beta=2.0, gamma_beta_ratio=0.3, alpha=0.0)) == pytest.approx(simpo, rel=1e-14)
    assert value(AlphaPO(beta=2.0, gamma_beta_ratio=0.3, alpha=1e-9)) == pytest.approx(simpo, rel=1e-7)


def test_robust_dpo_is_unbiased(inputs):
    """Labels swapped with the flip rate: on average the loss is DPO's on the true ones. For smoothed DPO it is not."""
    pair = PAIRS["prefers the chosen"]
    right, swapped = step_of(inputs, "prefers the chosen"), inputs(pair.policy[::-1], pair.reference[::-1])
    target = DPO(beta=0.4, label_smoothing=0.0)(right).losses.item()

    def average(loss):
        return 0.8 * loss(right).losses.item() + 0.2 * loss(swapped).losses.item()

    assert average(RobustDPO(beta=0.4, flip_rate=0.2)) == pytest.approx(target, rel=1e-12)
    assert abs(average(DPO(beta=0.4, label_smoothing=0.2)) - target) > 0.1


def test_the_exponential_goes_on_as_its_tangent(inputs, gradients):
    """At x = -30 and below: e^30 (1 - 30 - x), a slope that stays."""
    loss = GPO(beta=1.0, shape=Shape.exponential)
    for total in (-29.0, -30.0, -31.0, -40.0):
        step = inputs([[total], [0.0]], [[0.0], [0.0]])
        x = max(total, -30.0)
        output = loss(step)
        assert output.losses.item() == pytest.approx(exp(-x) * (1 + x - total), rel=1e-12)
        assert gradients(output.losses, step)[0] == pytest.approx([-exp(-x)], rel=1e-12)


@pytest.mark.parametrize("kind", [DiscoPOP(beta=0.5, tau=0.05), EXO(beta=0.5, epsilon=1e-3)])
def test_large_margins_either_way_are_finite_in_float32(inputs, kind):
    for u in (-1e4, -300.0, 300.0, 1e4):
        step = inputs([[u], [0.0]], [[0.0], [0.0]], dtype=torch.float32)
        losses = kind(step).losses
        (gradient,) = torch.autograd.grad(losses.sum(), step.policy.values)
        assert losses.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "valid", "key", "values"),
    [
        (RobustDPO, {"beta": 0.1, "flip_rate": 0.1}, "flip_rate", [-0.1, 0.5, nan]),
        (EXO, {"beta": 0.1, "epsilon": 0.1}, "epsilon", [0.0, 0.5, nan]),
        (DiscoPOP, {"beta": 0.1, "tau": 0.1}, "tau", [0.0, 1.0, nan]),
        (FDPO, {"beta": 0.1, "divergence": Divergence.alpha, "alpha": 0.5}, "alpha", [0.0, 1.0, nan, None]),
        (FDPO, {"beta": 0.1, "divergence": Divergence.forward_kl, "alpha": None}, "alpha", [0.5]),
        (FDPO, {"beta": 0.1, "divergence": Divergence.jensen_shannon, "alpha": None}, "alpha", [0.5]),
        (RDPO, {"beta": 0.1, "alpha": 0.1}, "alpha", [-0.1, inf, nan]),
        (DPOP, {"beta": 0.1, "lam": 1.0}, "lam", [-1.0, inf, nan]),
        (AlphaPO, {"beta": 1.0, "gamma_beta_ratio": 0.1, "alpha": 0.1}, "alpha", [inf, nan]),
        (AlphaPO, {"beta": 1.0, "gamma_beta_ratio": 0.1, "alpha": 0.1}, "gamma_beta_ratio", [-0.1, inf, nan]),
        (RePO, {"gamma": 0.5}, "gamma", [-0.1, inf, nan]),
        (SLiCHF, {"delta": 1.0, "lam": 0.1}, "delta", [-0.1, inf, nan]),
        (SLiCHF, {"delta": 1.0, "lam": 0.1}, "lam", [-0.1, inf, nan]),
        *[
            (kind, {"beta": 0.1}, "beta", [0.0, -1.0, inf, nan])
            for kind in (Hinge, NCA, SPPO, APOZero, APODown, BCOPair, LNDPO, CalDPO)
        ],
    ],
)
def test_refuses(kind, valid, key, values):
    kind(**valid)
    for value in values:
        with pytest.raises(UserError, match=rf"loss\.{key} must be"):
            kind(**valid | {key: value})
