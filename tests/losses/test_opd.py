"""On-policy distillation: values by hand, and its sampled gradient against that of the exact KL of a tiny language."""

from math import exp, log

import pytest
import torch

from alignment.errors import UserError
from alignment.losses import DPO, OPD, LossInputs, Mixture
from alignment.losses.opd import Credit
from alignment.types import RaggedLogps
from tests.helpers.tiny_language import ANSWERS, PREFIXES, WORDS, logps, tables

TOKEN, REST = OPD(coef=0.5, credit=Credit.token), OPD(coef=0.5, credit=Credit.rest)


def ragged(*sequences):
    return RaggedLogps.from_sequences([torch.tensor(s, dtype=torch.float64) for s in sequences])


def step(policy, teacher, drawn):
    values = ragged(*policy)
    policy = RaggedLogps(values.values.requires_grad_(), values.offsets)
    labels = torch.ones(len(policy), dtype=torch.bool)
    return LossInputs(policy, ragged(*teacher), labels, drawn=None if drawn is None else ragged(*drawn))


def three():
    """Two answers of 2 and 1 tokens; the policy has moved from where they were drawn by log 2, 0 and -log 2."""
    drawn = [[-1.0, -0.5], [-0.25]]
    return step([[-1.0 + log(2), -0.5], [-0.25 - log(2)]], [[-0.6, -1.5], [-1.25]], drawn)


@pytest.mark.parametrize("loss", [TOKEN, REST], ids=["token", "rest"])
def test_the_loss_and_its_gradient_by_hand(loss):
    """log p - log q is log 2 - 0.4, 1 and 1 - log 2; the ratios are 2, 1 and 1/2; two items on three tokens give
    k = 2/3. With rest the first token answers for the second, too."""
    inputs = three()
    gaps = [log(2) - 0.4, 1.0, 1 - log(2)]
    owed = [gaps[0] + (loss is REST) * gaps[1], *gaps[1:]]
    by_token = [2 / 3 * 0.5 * ratio * gap for ratio, gap in zip([2, 1, 0.5], owed, strict=True)]
    output = loss(inputs)
    assert output.losses.tolist() == pytest.approx([by_token[0] + by_token[1], by_token[2]], rel=1e-14)
    assert output.rewards.tolist() == pytest.approx([-0.5 * (gaps[0] + gaps[1]), -0.5 * gaps[2]], rel=1e-14)
    assert output.parts["drift"].tolist() == pytest.approx([log(2) / 2, -log(2)], rel=1e-14)
    output.losses.sum().backward()
    assert inputs.policy.values.grad.tolist() == pytest.approx(by_token, rel=1e-14)


def test_right_after_a_draw_the_loss_is_the_sampled_kl_per_token():
    """coef / 3 times (-0.4 + 1.0 + 1.0) is the mean of the items, given the drawn log-probs or without them."""
    policy, teacher = [[-1.0, -0.5], [-0.25]], [[-0.6, -1.5], [-1.25]]
    for drawn in (policy, None):
        assert TOKEN(step(policy, teacher, drawn)).losses.mean().item() == pytest.approx(0.5 * 1.6 / 3, rel=1e-14)


@pytest.mark.parametrize("loss", [TOKEN, REST], ids=["token", "rest"])
def test_a_teacher_that_is_the_policy_teaches_nothing(loss):
    """The loss and every derivative are exactly 0."""
    values = [[-1.0, -0.5], [-0.25]]
    inputs = step(values, values, values)
    losses = loss(inputs).losses
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0] and not inputs.policy.values.grad.any()


# The expected gradient, by listing every answer


def expected_gradient(loss, student, teacher):
    """That of the loss, averaged over all answers with the student's probabilities. k is put back to 1."""
    total = torch.zeros_like(student)
    for answer in ANSWERS:
        own, drawn = logps(student, answer), logps(student, answer).detach()
        one = RaggedLogps(own, torch.tensor([0, len(answer)]))
        given = [RaggedLogps(values, one.offsets) for values in (logps(teacher, answer), drawn)]
        [value] = loss(LossInputs(one, given[0], torch.tensor([True]), drawn=given[1])).losses
        (gradient,) = torch.autograd.grad(value * len(answer), student)
        total += drawn.sum().exp() * gradient
    return total


@pytest.mark.parametrize("credit", list(Credit))
def test_the_expected_gradient_is_that_of_the_exact_kl(credit):
    """By listing every answer: rest gives that of KL(policy || teacher) over answers, token that of the next-token KLs
    with the probabilities of the prefixes held fixed; the two differ."""
    student, teacher = tables(0).requires_grad_(), tables(1)
    assert sum(logps(student, answer).sum().exp().item() for answer in ANSWERS) == pytest.approx(1, rel=1e-12)
    whole = sum(logps(student, a).sum().exp() * (logps(student, a).sum() - logps(teacher, a).sum()) for a in ANSWERS)
    by_prefix = torch.zeros((), dtype=torch.float64)
    for row, prefix in enumerate(PREFIXES):
        reached = logps(student, prefix).sum().exp().detach() if prefix else 1.0
        p, q = student[row].log_softmax(-1), teacher[row].log_softmax(-1)
        by_prefix = by_prefix + reached * (p.exp() * (p - q)).sum()
    assert by_prefix.item() == pytest.approx(whole.item(), rel=1e-12)  # the chain rule of the KL
    exact = {Credit.rest: whole, Credit.token: by_prefix}
    gradients = {one: torch.autograd.grad(value, student, retain_graph=True)[0] for one, value in exact.items()}
    assert (gradients[Credit.rest] - gradients[Credit.token]).abs().max() > 0.01
    found = expected_gradient(OPD(coef=2.0, credit=credit), student, teacher)
    torch.testing.assert_close(found, 2.0 * gradients[credit], rtol=1e-10, atol=1e-14)


def test_the_ratio_makes_older_answers_count_as_new_ones():
    """Answers of one token, drawn by another policy: their expected gradient is that of the KL of the policy now."""
    student, older, teacher = (tables(seed)[0].log_softmax(-1) for seed in (0, 2, 1))
    logits = student.clone().requires_grad_()
    total = torch.zeros(WORDS, dtype=torch.float64)
    for word in range(WORDS):
        own = RaggedLogps(logits.log_softmax(-1)[word : word + 1], torch.tensor([0, 1]))
        q, d = (RaggedLogps(values[word : word + 1], own.offsets) for values in (teacher, older))
        [value] = OPD(coef=1.0, credit=Credit.token)(LossInputs(own, q, torch.tensor([True]), drawn=d)).losses
        total += exp(older[word]) * torch.autograd.grad(value, logits)[0]
    p = logits.log_softmax(-1)
    torch.testing.assert_close(total, torch.autograd.grad((p.exp() * (p - teacher)).sum(), logits)[0])


def test_no_part_of_a_mixture():
    parts = {"dpo": DPO(beta=0.1, label_smoothing=0.0), "opd": TOKEN}
    with pytest.raises(UserError, match=r"loss\.weights cannot name opd: it draws answers of its own"):
        Mixture(weights={"dpo": 1.0, "opd": 1.0}, settings=parts)
