"""Losses with an NLL term: value and gradient against formulas written out with plain numbers."""

from dataclasses import dataclass
from math import exp, inf, log, nan

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import CPO, NLL, ORPO, RPO, TPO, TPOL, CPOSimPO, SimPO
from alignment.losses.nll import NLLReduction, NLLScope
from tests.helpers.loss_examples import SEQUENCES, TOKENS, WITH_PROMPTS

SUMS = {"nll_reduction": NLLReduction.sequence_sum, "nll_scope": NLLScope.response}
PROMPT_MEANS = {"nll_reduction": NLLReduction.sequence_mean, "nll_scope": NLLScope.prompt_and_response}


def s(x):
    return 1 / (1 + exp(-x))


def sp(x):
    return log(1 + exp(x))


@dataclass
class Pair:
    """Per-token log-probs of a prompt, a chosen and a rejected completion, and what formulas are written in."""

    prompt: list
    policy: list
    reference: list

    def __post_init__(self):
        self.a, self.b = map(sum, self.policy)
        self.n_w, self.n_l = map(len, self.policy)
        self.mean_a, self.mean_b = self.a / self.n_w, self.b / self.n_l
        self.d = self.a - sum(self.reference[0]) - self.b + sum(self.reference[1])
        self.nll = {
            "tokens": -self.a / self.n_w,  # a step of one pair
            "sequences": -self.a / self.n_w,
            "sums": -self.a,
            "prompts": -(self.a + sum(self.prompt)) / (self.n_w + len(self.prompt)),
        }
        self.k = {"tokens": 1 / self.n_w, "sequences": 1 / self.n_w, "sums": 1, "prompts": 1 / (self.n_w + 2)}


PAIRS = {
    "prefers the chosen": Pair([-0.5, -1.5], [[-0.5, -1.0, -0.25], [-1.0, -2.5]], [[-0.75, -1.25, -0.5], [-0.5, -1.5]]),
    "prefers the rejected": Pair(
        [-2.0, -0.25], [[-2.0, -1.5], [-0.25, -0.5, -0.25]], [[-1.0, -1.0], [-0.75, -1.5, -0.5]]
    ),
}
FORMS = {"tokens": TOKENS, "sequences": SEQUENCES, "sums": SUMS, "prompts": PROMPT_MEANS}


def odds(mean):
    return exp(mean) / (1 - exp(mean))


def cpo(p):
    return 0.4 * (s(-0.4 * (p.a - p.b)) - 0.1)


def simpo(p):
    return 2 * s(0.6 - 2 * (p.mean_a - p.mean_b))


def against(p):
    return s(-log(odds(p.mean_a) / odds(p.mean_b)))


CASES = {
    "cpo": (
        lambda form: CPO(beta=0.4, lam=0.7, label_smoothing=0.1, **form),
        0.7,
        lambda p: 0.9 * sp(-0.4 * (p.a - p.b)) + 0.1 * sp(0.4 * (p.a - p.b)),
        lambda p: (cpo(p), cpo(p)),
        lambda p: (0.4 * p.a, 0.4 * p.b),
    ),
    "cpo_simpo": (
        lambda form: CPOSimPO(beta=2.0, gamma_beta_ratio=0.3, alpha=0.7, **form),
        0.7,
        lambda p: sp(0.6 - 2 * (p.mean_a - p.mean_b)),
        lambda p: (simpo(p) / p.n_w, simpo(p) / p.n_l),
        lambda p: (2 * p.mean_a, 2 * p.mean_b),
    ),
    "rpo": (
        lambda form: RPO(beta=0.4, alpha=0.7, **form),
        0.7,
        lambda p: sp(-0.4 * p.d),
        lambda p: (0.4 * s(-0.4 * p.d), 0.4 * s(-0.4 * p.d)),
        lambda p: tuple(0.4 * (x - sum(r)) for x, r in zip((p.a, p.b), p.reference, strict=True)),
    ),
    "orpo": (
        lambda form: ORPO(lam=0.5, **form),
        1,
        lambda p: 0.5 * sp(-log(odds(p.mean_a) / odds(p.mean_b))),
        lambda p: (
            0.5 * against(p) / ((1 - exp(p.mean_a)) * p.n_w),
            0.5 * against(p) / ((1 - exp(p.mean_b)) * p.n_l),
        ),
        lambda p: (log(odds(p.mean_a)), log(odds(p.mean_b))),
    ),
}
every_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
every_form = pytest.mark.parametrize("form", FORMS)


def step_of(inputs, ragged, pair):
    return inputs(pair.policy, pair.reference, prompts=ragged([pair.prompt], requires_grad=True))


@pytest.mark.parametrize(("make", "weight", "value", "weights", "rewards"), CASES.values(), ids=CASES)
@every_pair
@every_form
def test_by_formula(inputs, ragged, gradients, make, weight, value, weights, rewards, pair, form):
    """Preference term plus weighted NLL: value, the gradient at every token, rewards, the part `nll`."""
    step = step_of(inputs, ragged, pair)
    loss = make(FORMS[form])
    assert loss.requirements().prompts == (form == "prompts")
    output = loss(step)
    assert output.losses.tolist() == pytest.approx([value(pair) + weight * pair.nll[form]], rel=1e-12)
    assert output.parts["nll"].tolist() == pytest.approx([pair.nll[form]], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx(rewards(pair), rel=1e-12)
    chosen, rejected = gradients(output.losses, step)
    g_w, g_l = weights(pair)
    assert chosen == pytest.approx([-g_w - weight * pair.k[form]] * pair.n_w, rel=1e-11)
    assert rejected == pytest.approx([g_l] * pair.n_l, rel=1e-11)
    (prompt,) = torch.autograd.grad(output.losses.sum(), step.prompts.values, allow_unused=True)
    if form == "prompts":
        assert prompt.tolist() == pytest.approx([-weight * pair.k[form]] * 2, rel=1e-12)
    else:
        assert prompt is None


def test_cpo_by_hand(inputs):
    """a = -log 2 and b = -log 6 at beta 1: log(1 + 1/3) for the preference, log 2 for the NLL of one token.

    The other way round, the policy prefers the wrong answer: log(1 + 3) and log 6, with half the weight.
    """
    losses = CPO(beta=1.0, lam=1.0, label_smoothing=0.0, **SUMS)(inputs([[-log(2)], [-log(6)]])).losses
    assert losses.tolist() == pytest.approx([log(4 / 3) + log(2)], rel=1e-14)
    losses = CPO(beta=1.0, lam=0.5, label_smoothing=0.0, **SUMS)(inputs([[-log(6)], [-log(2)]])).losses
    assert losses.tolist() == pytest.approx([log(4) + log(6) / 2], rel=1e-14)


def test_rpo_by_hand(inputs):
    """u = log 3 and v = 0: log(4/3); u = 0 and v = log 3: log 4. The chosen one has one token of 2 nats."""
    loss = RPO(beta=1.0, alpha=0.5, **SEQUENCES)
    losses = loss(inputs([[-2.0], [-1.0]], [[-2.0 - log(3)], [-1.0]])).losses
    assert losses.tolist() == pytest.approx([log(4 / 3) + 1], rel=1e-14)
    losses = loss(inputs([[-2.0], [-1.0]], [[-2.0], [-1.0 - log(3)]])).losses
    assert losses.tolist() == pytest.approx([log(4) + 1], rel=1e-14)


@every_pair
def test_cpo_simpo_is_simpo_and_nll(inputs, ragged, pair):
    step = step_of(inputs, ragged, pair)
    expected = SimPO(beta=2.0, gamma_beta_ratio=0.3)(step).losses + 0.05 * NLL(**WITH_PROMPTS)(step).losses
    found = CPOSimPO(beta=2.0, gamma_beta_ratio=0.3, alpha=0.05, **WITH_PROMPTS)(step).losses
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


GOLD = [-1.5, -0.5, -0.5]


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@every_form
@pytest.mark.parametrize("normalised", [False, True])
def test_triples_by_formula(inputs, ragged, gradients, pair, form, normalised):
    """A gold answer of 2.5 nats over 3 tokens, then the chosen and the rejected one."""
    step = inputs([GOLD, *pair.policy], sizes=torch.tensor([3]), prompts=ragged([pair.prompt], requires_grad=True))
    count = 5 if form == "prompts" else 3
    k = 1 if form == "sums" else 1 / count
    nll = (2.5 - (sum(pair.prompt) if form == "prompts" else 0)) * k
    if normalised:
        loss = TPOL(beta=2.0, gamma_beta_ratio=0.3, alpha=0.7, **FORMS[form])
        value, scale = sp(0.6 - 2 * (pair.mean_a - pair.mean_b)), simpo(pair)
        g_w, g_l = scale / pair.n_w, scale / pair.n_l
        rewards = (2 * -2.5 / 3, 2 * pair.mean_a, 2 * pair.mean_b)
    else:
        loss = TPO(beta=0.4, alpha=0.7, **FORMS[form])
        value = sp(-0.4 * (pair.a - pair.b))
        g_w = g_l = 0.4 * s(-0.4 * (pair.a - pair.b))
        rewards = (0.4 * -2.5, 0.4 * pair.a, 0.4 * pair.b)
    output = loss(step)
    assert output.losses.tolist() == pytest.approx([value + 0.7 * nll], rel=1e-12)
    assert output.parts["nll"].tolist() == pytest.approx([nll], rel=1e-12)
    assert output.rewards.tolist() == pytest.approx(rewards, rel=1e-12)
    gold, chosen, rejected = gradients(output.losses, step)
    assert gold == pytest.approx([-0.7 * k] * 3, rel=1e-12)
    assert chosen == pytest.approx([-g_w] * pair.n_w, rel=1e-11)
    assert rejected == pytest.approx([g_l] * pair.n_l, rel=1e-11)


@pytest.mark.parametrize(
    "loss", [TPO(beta=0.1, alpha=1.0, **TOKENS), TPOL(beta=2.0, gamma_beta_ratio=0.8, alpha=1.0, **TOKENS)]
)
@pytest.mark.parametrize("sizes", [[2], [4], [3, 2], [2, 4]])
def test_triples_refuse_other_lists(inputs, loss, sizes):
    step = inputs([[-1.0]] * sum(sizes), sizes=torch.tensor(sizes))
    for compute in (loss, loss.at_reference):
        with pytest.raises(ValueError, match="lists of three"):
            compute(step)
    assert [loss.problem(size, None) is None for size in (2, 3, 4)] == [False, True, False]


def cpo_with(**values):
    return CPO(**{"beta": 0.1, "lam": 1.0, "label_smoothing": 0.0} | TOKENS | values)


def test_cpo_without_nll_is_its_preference_alone(inputs):
    """a - b = 2.5 at beta 0.1: log(1 + e^-0.25) = 0.5759."""
    assert cpo_with(lam=0.0)(inputs([[-2.5], [-5.0]])).losses.item() == pytest.approx(0.5759394199, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "valid", "key", "values"),
    [
        (CPO, {"beta": 0.1, "lam": 1.0, "label_smoothing": 0.1}, "beta", [0.0, -1.0, inf, nan]),
        (CPO, {"beta": 0.1, "lam": 1.0, "label_smoothing": 0.1}, "lam", [-0.1, inf, nan]),
        (CPO, {"beta": 0.1, "lam": 1.0, "label_smoothing": 0.1}, "label_smoothing", [-0.1, 0.5, nan]),
        (CPOSimPO, {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.1}, "beta", [0.0, inf, nan]),
        (CPOSimPO, {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.1}, "gamma_beta_ratio", [-0.1, inf, nan]),
        (CPOSimPO, {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.1}, "alpha", [0.0, -0.1, inf, nan]),
        (RPO, {"beta": 0.1, "alpha": 1.0}, "beta", [0.0, inf, nan]),
        (RPO, {"beta": 0.1, "alpha": 1.0}, "alpha", [0.0, -0.1, inf, nan]),
        (TPO, {"beta": 0.1, "alpha": 1.0}, "beta", [0.0, inf, nan]),
        (TPO, {"beta": 0.1, "alpha": 1.0}, "alpha", [0.0, -0.1, inf, nan]),
        (TPOL, {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.1}, "beta", [0.0, inf, nan]),
        (TPOL, {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.1}, "gamma_beta_ratio", [-0.1, inf, nan]),
        (TPOL, {"beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 0.1}, "alpha", [0.0, inf, nan]),
    ],
)
def test_refuses(kind, valid, key, values):
    kind(**valid, **TOKENS)
    for value in values:
        with pytest.raises(UserError, match=rf"^loss\.{key} must be .*, not .*\.$"):
            kind(**valid | {key: value}, **TOKENS)
