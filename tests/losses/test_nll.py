"""The NLL of the preferred completions: reductions, scopes, and all three kinds of data."""

from dataclasses import replace
from math import inf

import pytest
import torch

from alignment.losses import NLL, StepTotals
from alignment.losses.nll import NLLReduction, NLLScope, nll, nll_by_hand

TOKEN_MEAN, SEQUENCE_MEAN, SEQUENCE_SUM = NLLReduction
RESPONSE, BOTH = NLLScope

SEQUENCES = [[-0.5, -1.0, -0.25, -0.75], [-9.0] * 3, [-4.0, -2.0, -3.0, -1.0, -2.0], [-9.0]]
"""Favoured: 2.5 nats over 4 tokens and 12 over 5; the others stand out by their 9."""
PROMPTS = [[-1.0, -0.5], [-2.0, -0.5, -1.0]]
"""1.5 nats over 2 tokens and 3.5 over 3."""
VALUES = {
    # 14.5 nats over 9 tokens: 1.6111; the mean over the items must be that, so item i has its sum times 2 / 9.
    (TOKEN_MEAN, RESPONSE): [2.5 * 2 / 9, 12 * 2 / 9],
    # 0.625 and 2.4, on average 1.5125.
    (SEQUENCE_MEAN, RESPONSE): [2.5 / 4, 12 / 5],
    (SEQUENCE_SUM, RESPONSE): [2.5, 12.0],
    # 4 nats over 6 tokens and 15.5 over 8.
    (TOKEN_MEAN, BOTH): [4 * 2 / 14, 15.5 * 2 / 14],
    (SEQUENCE_MEAN, BOTH): [4 / 6, 15.5 / 8],
    (SEQUENCE_SUM, BOTH): [4.0, 15.5],
}
every_form = pytest.mark.parametrize(("reduction", "scope"), VALUES, ids=lambda option: option.value)


@pytest.fixture
def pairs(inputs, ragged):
    return inputs(SEQUENCES, prompts=ragged(PROMPTS, requires_grad=True))


@every_form
def test_pairs(pairs, reduction, scope):
    expected = VALUES[reduction, scope]
    assert nll(pairs, reduction, scope).tolist() == pytest.approx(expected, rel=1e-14)
    assert nll_by_hand(pairs, reduction, scope).tolist() == pytest.approx(expected, rel=1e-14)


def test_the_two_means_differ(pairs):
    """Two answers of 4 and 5 tokens: 1.6111 by tokens, 1.5125 by sequences."""
    assert nll(pairs, TOKEN_MEAN, RESPONSE).mean().item() == pytest.approx(1.6111, abs=5e-5)
    assert nll(pairs, SEQUENCE_MEAN, RESPONSE).mean().item() == pytest.approx(1.5125, abs=5e-5)


@every_form
def test_lists_favour_their_first(inputs, ragged, reduction, scope):
    first, other, second, another = SEQUENCES
    step = inputs([first, other, [-8.0] * 2, second, another], sizes=torch.tensor([3, 2]), prompts=ragged(PROMPTS))
    assert nll(step, reduction, scope).tolist() == pytest.approx(VALUES[reduction, scope], rel=1e-14)
    assert nll_by_hand(step, reduction, scope).tolist() == pytest.approx(VALUES[reduction, scope], rel=1e-14)


@every_form
def test_undesirable_rows_count_as_nothing(inputs, ragged, reduction, scope):
    """Three rows, the middle one undesirable: 0, and neither its tokens nor its prompt's are in the token mean."""
    first, other, second, _ = SEQUENCES
    step = inputs([first, other, second], None, [True, False, True], prompts=ragged([PROMPTS[0], [-7.0], PROMPTS[1]]))
    one, two = VALUES[reduction, scope]
    share = 3 / 2 if reduction is TOKEN_MEAN else 1  # the mean is over three items instead of two
    expected = [one * share, 0.0, two * share]
    assert nll(step, reduction, scope).tolist() == pytest.approx(expected, rel=1e-14)
    assert nll_by_hand(step, reduction, scope).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("reduction", NLLReduction)
def test_a_step_of_undesirable_rows_alone_is_zero(inputs, reduction):
    step = inputs(SEQUENCES[:2], None, [False, False])
    losses = nll(step, reduction, RESPONSE)
    assert losses.tolist() == [0.0, 0.0]
    (gradient,) = torch.autograd.grad(losses.sum(), step.policy.values)
    assert not gradient.any()


@every_form
def test_a_part_counts_as_in_the_whole_step(pairs, reduction, scope):
    """The first pair of a step that has 4 pairs with 90 chosen and 10 prompt tokens."""
    part = replace(
        pairs, policy=pairs.policy.select([0, 1]), prompts=pairs.prompts.select([0]), totals=StepTotals(4, 90, 10)
    )
    expected = VALUES[reduction, scope][0]
    if reduction is TOKEN_MEAN:
        expected = 2.5 * 4 / 90 if scope is RESPONSE else 4 * 4 / 100
    assert nll(part, reduction, scope).tolist() == pytest.approx([expected], rel=1e-14)
    assert nll_by_hand(part, reduction, scope).tolist() == pytest.approx([expected], rel=1e-14)


@every_form
def test_loss(pairs, gradients, reduction, scope):
    """The same numbers; per token -k at the chosen and 0 at the rejected ones; rewards are means, or sums."""
    loss = NLL(nll_reduction=reduction, nll_scope=scope)
    assert loss.requirements().prompts == (scope is BOTH)
    output = loss(pairs)
    assert output.losses.tolist() == pytest.approx(VALUES[reduction, scope], rel=1e-14)
    lengths = (6, 8) if scope is BOTH else (4, 5)
    first, second = {
        TOKEN_MEAN: (2 / sum(lengths),) * 2,
        SEQUENCE_MEAN: (1 / lengths[0], 1 / lengths[1]),
        SEQUENCE_SUM: (1, 1),
    }[reduction]
    expected = [[-first] * 4, [0] * 3, [-second] * 5, [0]]
    for found, wanted in zip(gradients(output.losses, pairs), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-14)
    if scope is BOTH:
        (gradient,) = torch.autograd.grad(output.losses.sum(), pairs.prompts.values)
        assert gradient.tolist() == pytest.approx([-first] * 2 + [-second] * 3, rel=1e-14)
    rewards = [-2.5, -27.0, -12.0, -9.0] if reduction is SEQUENCE_SUM else [-0.625, -9.0, -2.4, -9.0]
    assert output.rewards.tolist() == pytest.approx(rewards, rel=1e-14)


def test_a_prompt_of_one_token_adds_nothing(inputs, ragged):
    """Nothing predicts its first token, so there is none to score."""
    step = inputs(SEQUENCES, prompts=ragged([[], []]))
    for reduction in NLLReduction:
        assert torch.equal(nll(step, reduction, BOTH), nll(step, reduction, RESPONSE))


def test_a_rejected_answer_of_no_probability_is_not_read(inputs):
    step = inputs([[-1.0], [-inf]])
    assert nll(step, TOKEN_MEAN, RESPONSE).tolist() == [1.0]
