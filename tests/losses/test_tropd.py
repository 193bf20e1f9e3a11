"""TrOPD: values by hand, OPD where every token is trusted, and the expected gradient over all answers of a language."""

from dataclasses import replace
from itertools import product
from math import exp, log

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import OPD, LossInputs, Quantity, TrOPD
from alignment.losses import tropd as module
from alignment.losses.opd import Credit
from alignment.losses.tropd import Outliers
from alignment.types import RaggedLogps
from tests.helpers.tiny_language import ANSWERS, PREFIXES, WORDS, logps, tables

FORWARD = TrOPD(coef=0.5, outliers=Outliers.forward_kl, top_k=2, renormalise=False)
MASK = replace(FORWARD, outliers=Outliers.mask)


def ragged(*sequences):
    return RaggedLogps.from_sequences([torch.tensor(s, dtype=torch.float64) for s in sequences])


def step(policy, teacher, drawn, forward_kl, seeds=None):
    values, kl = ragged(*policy), ragged(*forward_kl)
    return LossInputs(
        RaggedLogps(values.values.requires_grad_(), values.offsets),
        ragged(*teacher),
        torch.ones(len(policy), dtype=torch.bool),
        drawn=ragged(*drawn),
        quantities={Quantity.forward_kl: RaggedLogps(kl.values.requires_grad_(), kl.offsets)},
        seeds=None if seeds is None else torch.tensor(seeds),
    )


def three(seeds=None):
    """Two answers of 2 and 1 tokens; the policy has moved from where they were drawn by log 2, 0 and -log 2."""
    policy, drawn = [[-1.0 + log(2), -0.5], [-0.25 - log(2)]], [[-1.0, -0.5], [-0.25]]
    return step(policy, [[-0.2, -1.5], [-1.25]], drawn, [[0.3, 0.7], [0.9]], seeds)


@pytest.mark.parametrize("mask", list(product([0.0, 1.0], repeat=3)))
def test_the_loss_and_its_gradient_by_hand(mask, monkeypatch):
    """log p - log q is log 2 - 0.8, 1 and 1 - log 2; the ratios are 2, 1 and 1/2; two items on three tokens give
    k = 2/3. A trusted token has its gap, any other its forward KL, both times the ratio."""
    monkeypatch.setattr(module, "_trusted", lambda inputs, gaps: torch.tensor(mask, dtype=torch.float64))
    gaps, kls, ratios = [log(2) - 0.8, 1.0, 1 - log(2)], [0.3, 0.7, 0.9], [2, 1, 0.5]
    trusted = [2 / 3 * 0.5 * r * m * gap for r, m, gap in zip(ratios, mask, gaps, strict=True)]
    rest = [2 / 3 * 0.5 * r * (1 - m) * kl for r, m, kl in zip(ratios, mask, kls, strict=True)]
    for loss, others in ((FORWARD, rest), (MASK, [0.0] * 3)):
        inputs = three()
        output, terms = loss(inputs), [a + b for a, b in zip(trusted, others, strict=True)]
        assert output.losses.tolist() == pytest.approx([terms[0] + terms[1], terms[2]], rel=1e-14)
        assert output.rewards.tolist() == pytest.approx([-0.5 * (gaps[0] + gaps[1]), -0.5 * gaps[2]], rel=1e-14)
        assert output.parts["drift"].tolist() == pytest.approx([log(2) / 2, -log(2)], rel=1e-14)
        assert output.parts["trusted"].tolist() == [(mask[0] + mask[1]) / 2, mask[2]]
        output.losses.sum().backward()
        assert inputs.policy.values.grad.tolist() == pytest.approx(trusted, rel=1e-14)
        slopes = [2 / 3 * 0.5 * r * (1 - m) for r, m in zip(ratios, mask, strict=True)]
        gradient = inputs.quantities[Quantity.forward_kl].values.grad
        assert others == [0.0] * 3 if gradient is None else gradient.tolist() == pytest.approx(slopes, rel=1e-14)


@pytest.mark.parametrize("loss", [FORWARD, MASK], ids=["forward_kl", "mask"])
def test_where_the_teacher_is_always_to_be_trusted_it_is_opd(loss):
    """To the bit: a teacher that finds every token at least as likely. With a draw of M, and with its mean."""
    policy, drawn = [[-1.0, -2.5], [-0.75]], [[-1.1, -2.0], [-0.7]]
    teacher, opd = [[-1.0, -0.1], [-0.7]], OPD(coef=0.5, credit=Credit.token)
    for seeds in ([7, 8], None):
        ours, theirs = (step(policy, teacher, drawn, [[0.3, 0.7], [0.9]], seeds) for _ in range(2))
        found, expected = loss(ours), opd(theirs)
        assert torch.equal(found.losses, expected.losses) and torch.equal(found.rewards, expected.rewards)
        assert torch.equal(found.parts["drift"], expected.parts["drift"])
        gradients = (
            torch.autograd.grad(o.losses.sum(), i.policy.values)[0] for o, i in ((found, ours), (expected, theirs))
        )
        assert torch.equal(*gradients)


# M


def test_m_is_1_as_often_as_the_teacher_would_take_the_token():
    """Gaps of -0.1, 0.5 and 3: 1, exp(-0.5) and exp(-3) of 4000 draws, to five standard deviations; one token's draw
    tells nothing of another's. Without seeds M is its mean."""
    inputs = step([[-1.0, -1.0, -1.0]], [[-0.9, -1.5, -4.0]], [[-1.0] * 3], [[0.0] * 3])
    expected = torch.tensor([1.0, exp(-0.5), exp(-3)], dtype=torch.float64)
    gaps = RaggedLogps(torch.tensor([-0.1, 0.5, 3.0], dtype=torch.float64), inputs.policy.offsets)
    torch.testing.assert_close(module._trusted(inputs, gaps), expected, rtol=1e-12, atol=0)
    found = torch.stack([module._trusted(replace(inputs, seeds=torch.tensor([seed])), gaps) for seed in range(4000)])
    assert set(found.unique().tolist()) == {0.0, 1.0}
    deviation = (expected * (1 - expected) / 4000).sqrt()
    assert ((found.mean(0) - expected).abs() <= 5 * deviation).all()
    both = (found[:, 1] * found[:, 2]).mean() - expected[1] * expected[2]
    assert abs(both) < 5 * (expected[1] * expected[2] / 4000) ** 0.5


def test_m_is_that_of_the_answer_wherever_it_stands():
    """By itself, in another order, or beside others."""
    gaps = RaggedLogps(torch.full((9,), 0.7, dtype=torch.float64), torch.tensor([0, 4, 9]))
    both = replace(three(), policy=gaps, reference=gaps, drawn=None, quantities={}, seeds=torch.tensor([3, 4]))
    one, two = (module._trusted(both, gaps)[part] for part in (slice(0, 4), slice(4, 9)))
    order = RaggedLogps(gaps.values, torch.tensor([0, 5, 9]))
    turned = replace(both, policy=order, reference=order, seeds=torch.tensor([4, 3]))
    assert torch.equal(module._trusted(turned, order), torch.cat([two, one]))
    assert 0 < one.sum() + two.sum() < 9


# The expected gradient, by listing every answer and every M


def forward_kl(student, teacher, top_k):
    """(prefixes,) over the teacher's likeliest words at each prefix."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    best = q.topk(top_k).indices
    return (q.exp() * (q - p)).gather(-1, best).sum(-1)


def at_prefixes(values, answer):
    return torch.stack([values[PREFIXES.index(answer[:t])] for t in range(len(answer))])


def expected_gradient(loss, student, teacher, mask_of):
    """That of the loss, averaged over all answers with the student's probabilities and over M as `mask_of` gives it:
    pairs of a chance and of M, None for the loss's own mean. k is put back to 1."""
    total = torch.zeros_like(student)
    for answer in ANSWERS:
        own = logps(student, answer)
        drawn, kl = own.detach(), at_prefixes(forward_kl(student, teacher, loss.top_k), answer)
        offsets = torch.tensor([0, len(answer)])
        inputs = LossInputs(
            RaggedLogps(own, offsets),
            RaggedLogps(logps(teacher, answer), offsets),
            torch.tensor([True]),
            drawn=RaggedLogps(drawn, offsets),
            quantities={Quantity.forward_kl: RaggedLogps(kl, offsets)},
        )
        for chance, mask in mask_of(drawn, logps(teacher, answer)):
            with pytest.MonkeyPatch.context() as patch:
                if mask is not None:
                    patch.setattr(module, "_trusted", lambda inputs, gaps, mask=mask: mask)
                [value] = loss(inputs).losses
            (gradient,) = torch.autograd.grad(value * len(answer), student, retain_graph=True)
            total += drawn.sum().exp() * chance * gradient
    return total


def every_mask(p, q):
    accepted = (q - p).exp().clamp(max=1)
    for mask in product([0.0, 1.0], repeat=len(p)):
        chosen = torch.tensor(mask, dtype=torch.float64)
        chance = torch.where(chosen == 1, accepted, 1 - accepted).prod().item()
        if chance:
            yield chance, chosen


@pytest.mark.parametrize("top_k", [1, 2, WORDS])
@pytest.mark.parametrize("mask_of", [every_mask, lambda p, q: [(1.0, None)]], ids=["draws", "mean"])
def test_the_expected_gradient_is_that_of_its_closed_form(mask_of, top_k):
    """At each prefix, held fixed with its probability: sum over x of min(p, q) D log p, with min and D as numbers, and
    the total variation of p and q times the forward KL. It is another gradient than OPD's."""
    student, teacher = tables(0).requires_grad_(), tables(1)
    loss = TrOPD(coef=2.0, outliers=Outliers.forward_kl, top_k=top_k, renormalise=False)
    exact = torch.zeros((), dtype=torch.float64)
    kl = forward_kl(student, teacher, top_k)
    for row, prefix in enumerate(PREFIXES):
        reached = logps(student, prefix).sum().exp().detach() if prefix else 1.0
        p, q = student[row].log_softmax(-1), teacher[row].log_softmax(-1)
        common = torch.minimum(p.exp(), q.exp()).detach()
        exact = exact + reached * ((common * (p - q).detach() * p).sum() + (1 - common.sum()) * kl[row])
    (expected,) = torch.autograd.grad(exact, student)
    found = expected_gradient(loss, student, teacher, mask_of)
    assert (found - 2.0 * expected).abs().max() < 1e-12
    opd = OPD(coef=2.0, credit=Credit.token)
    assert (
        found - expected_gradient(_AsOPD(opd, top_k), student, teacher, lambda p, q: [(1.0, None)])
    ).abs().max() > 0.01


class _AsOPD:
    """OPD where a TrOPD is asked for."""

    def __init__(self, loss, top_k):
        self.loss, self.top_k = loss, top_k

    def __call__(self, inputs):
        return self.loss(inputs)


def test_what_it_asks_for():
    """Likeliest tokens only where they are read; settings that make no sense are refused."""
    assert FORWARD.requirements().quantities == {Quantity.forward_kl} and FORWARD.requirements().likeliest == 2
    assert not MASK.requirements().quantities and not MASK.requirements().likeliest
    assert MASK(replace(three(), quantities={})).losses.isfinite().all()
    for settings, words in ({"top_k": 0}, "loss.top_k must be at least 1"), ({"coef": 0.0}, "loss.coef must be"):
        with pytest.raises(UserError, match=words):
            replace(FORWARD, **settings)
    with pytest.raises(UserError, match=r"loss\.renormalise has no effect with loss\.outliers=mask"):
        replace(MASK, renormalise=True)
