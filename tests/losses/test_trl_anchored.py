"""Losses with an NLL term against TRL's own code; `trl_stubs` says how that is run."""

import pytest
import torch

from alignment.losses import CPO, DPO, NLL, ORPO, RPO, TPO, TPOL, CPOSimPO, LossInputs
from alignment.losses.nll import NLLReduction
from alignment.types import RaggedLogps
from tests.helpers.loss_examples import SEQUENCES, TOKENS, WITH_PROMPTS
from tests.helpers.trl_stubs import (
    POLICY,
    REFERENCE,
    assert_same_loss_and_gradient,
    paired_forward,
    random_forward,
    trl_cpo,
    trl_dpo,
    trl_orpo,
    trl_tpo,
)


def test_nll(inputs):
    """Over the chosen tokens of the batch."""
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_dpo(step, {"sft": 1.0}, 0.4)
    assert_same_loss_and_gradient(NLL(**TOKENS)(step).losses.mean(), theirs, step.policy.values)
    assert abs(theirs.item() - NLL(**SEQUENCES)(step).losses.mean().item()) > 1e-2


@pytest.mark.parametrize("alpha", [0.005, 1.0])
def test_rpo(inputs, alpha):
    """TRL's NLL is the batch's token mean; the paper's mean per sequence is another number."""
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_dpo(step, {"sigmoid": 1.0, "sft": alpha}, 0.4)
    assert_same_loss_and_gradient(RPO(beta=0.4, alpha=alpha, **TOKENS)(step).losses.mean(), theirs, step.policy.values)
    paper = RPO(beta=0.4, alpha=alpha, **SEQUENCES)(step).losses.mean().item()
    assert abs(theirs.item() - paper) > 1e-2 * alpha


def test_rpo_in_trl_depends_on_the_split_of_the_step(inputs):
    """The mean of TRL's two micro-batches, weighted by their pairs, is not its value for all; ours is the same."""
    step = inputs(POLICY, REFERENCE)
    loss = RPO(beta=0.4, alpha=1.0, **TOKENS)
    theirs = ours = 0.0
    for part in ([0, 1], [2, 3, 4, 5]):
        some = LossInputs(step.policy.select(part), step.reference.select(part), totals=step.step_totals())
        theirs += trl_dpo(some, {"sigmoid": 1.0, "sft": 1.0}, 0.4)[0].item() * len(part) / 6
        ours += loss(some).losses.sum().item() / 3
    assert ours == pytest.approx(loss(step).losses.mean().item(), rel=1e-14)
    assert abs(theirs - ours) > 1e-2


@pytest.mark.parametrize(("beta", "lam", "smoothing"), [(0.1, 1.0, 0.0), (0.5, 0.3, 0.2), (0.1, 0.0, 0.0)])
def test_cpo(beta, lam, smoothing):
    """TRL's NLL is the batch's token mean, not the paper's sum."""
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    output = CPO(beta=beta, lam=lam, label_smoothing=smoothing, **TOKENS)(step)
    theirs, logged = trl_cpo(model, batch, beta=beta, cpo_alpha=lam, label_smoothing=smoothing)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, model.logits)
    assert logged["rewards/chosen"] == pytest.approx(output.rewards[0::2].mean().item())
    paper = CPO(beta=beta, lam=lam, label_smoothing=smoothing, **TOKENS | {"nll_reduction": NLLReduction.sequence_sum})
    assert paper(step).losses.mean().item() - theirs.item() >= 5 * lam


@pytest.mark.parametrize(("beta", "ratio", "alpha"), [(10.0, 0.54, 0.05), (2.0, 0.5, 1.0)])
def test_cpo_simpo(beta, ratio, alpha):
    """TRL takes gamma = beta * ratio."""
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    output = CPOSimPO(beta=beta, gamma_beta_ratio=ratio, alpha=alpha, **TOKENS)(step)
    theirs, logged = trl_cpo(model, batch, loss_type="simpo", beta=beta, simpo_gamma=beta * ratio, cpo_alpha=alpha)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, model.logits)
    assert logged["nll_loss"] == pytest.approx(output.parts["nll"].mean().item())


@pytest.mark.parametrize(("prompt", "lengths"), [(4, [4, 4]), (1, [2, 6]), (4, [2, 6])])
def test_orpo_over_prompt_and_response(prompt, lengths):
    """With the scope and the reduction of TRL and the authors the losses are the same. TRL casts to float32."""
    model, batch, step, whole = paired_forward(prompt, lengths, [3, 6])
    prompts = RaggedLogps.from_sequences([logps[: prompt - 1] for logps in whole])
    step = LossInputs(step.policy, prompts=prompts)
    output = ORPO(lam=0.1, **WITH_PROMPTS)(step)
    theirs, logged = trl_orpo(model, batch, 0.1)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, model.logits, rel=2e-6)
    assert logged["nll_loss"] == pytest.approx(output.parts["nll"].mean().item(), rel=1e-6)


def triple_forward(prompt, lengths):
    """TRL's batch for random tokens, a model for it, and our inputs from the same logits.

    `lengths` has a triple per prompt: gold, chosen, rejected; TRL's rows are all chosen, all rejected, all gold.
    """
    items = len(lengths)
    model, batch, whole = random_forward(prompt, [lengths[i][k] for k in (1, 2, 0) for i in range(items)])
    best_first = [whole[k * items + i][prompt - 1 :] for i in range(items) for k in (2, 0, 1)]
    return model, batch, LossInputs(RaggedLogps.from_sequences(best_first), sizes=torch.full((items,), 3))


@pytest.mark.parametrize("alpha", [0.05, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "tpo-l"])
def test_tpo(loss_type, alpha):
    """TRL takes gamma, here 1.6 at beta 2."""
    model, batch, step = triple_forward(3, [(4, 2, 5), (1, 6, 3)])
    theirs, logged = trl_tpo(model, batch, loss_type=loss_type, beta=2.0, tpo_alpha=alpha, tpo_l_gamma=1.6)
    if loss_type == "sigmoid":
        output = TPO(beta=2.0, alpha=alpha, **TOKENS)(step)
    else:
        output = TPOL(beta=2.0, gamma_beta_ratio=0.8, alpha=alpha, **TOKENS)(step)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, model.logits)
    assert logged["rewards/chosen"] == pytest.approx([output.rewards[1::3].mean().item()])
    assert logged["rewards/rejected"] == pytest.approx([output.rewards[2::3].mean().item()])


def test_the_weighted_sum_by_hand(inputs):
    """TRL's code through the stub: the sum is that of its parts, so that parity cannot hold by a shared mistake."""
    step = inputs(POLICY, REFERENCE)
    dpo = DPO(beta=0.4, label_smoothing=0.0)(step).losses.mean().item()
    tokens = [x for sequence in POLICY[0::2] for x in sequence]
    expected = dpo - 0.5 * sum(tokens) / len(tokens)
    assert trl_dpo(step, {"sigmoid": 1.0, "sft": 0.5}, 0.4)[0].item() == pytest.approx(expected)
