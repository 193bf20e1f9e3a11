"""Losses with an NLL term against TRL's own code; `test_trl_parity` says how that is run."""

from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.tpo import TPOTrainer

from alignment.losses import CPO, DPO, NLL, ORPO, RPO, TPO, TPOL, CPOSimPO, LossInputs
from alignment.losses.nll import NLLReduction
from alignment.ragged import RaggedLogps
from tests.losses.examples import SEQUENCES, TOKENS, WITH_PROMPTS
from tests.losses.test_trl_parity import (
    POLICY,
    REFERENCE,
    VOCABULARY,
    PreparedLogProbs,
    assert_same_loss_and_gradient,
    bare,
    batch_of,
    paired_forward,
    trl_orpo,
    trl_simpo,
)


def trl_weighted(step, losses, beta=0.4):
    """TRL's mean of a weighted sum of losses."""
    rows = [*range(0, len(step.policy), 2), *range(1, len(step.policy), 2)]
    references = step.reference.sums()
    batch = batch_of(step.policy, rows)
    batch |= {"ref_chosen_logps": references[0::2], "ref_rejected_logps": references[1::2]}
    model = PreparedLogProbs(step.policy)
    trainer = bare(
        DPOTrainer,
        model=model,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(losses),
        loss_weights=list(losses.values()),
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
    )
    return trainer._compute_loss(model, batch, False)


def test_nll(inputs):
    """Over the chosen tokens of the batch."""
    step = inputs(POLICY, REFERENCE)
    theirs = trl_weighted(step, {"sft": 1.0})
    assert_same_loss_and_gradient(NLL(**TOKENS)(step).losses.mean(), theirs, step.policy.values)
    assert abs(theirs.item() - NLL(**SEQUENCES)(step).losses.mean().item()) > 1e-2


@pytest.mark.parametrize("alpha", [0.005, 1.0])
def test_rpo(inputs, alpha):
    """TRL's NLL is the batch's token mean; the paper's mean per sequence is another number."""
    step = inputs(POLICY, REFERENCE)
    theirs = trl_weighted(step, {"sigmoid": 1.0, "sft": alpha})
    assert_same_loss_and_gradient(RPO(beta=0.4, alpha=alpha, **TOKENS)(step).losses.mean(), theirs, step.policy.values)
    paper = RPO(beta=0.4, alpha=alpha, **SEQUENCES)(step).losses.mean().item()
    assert abs(theirs.item() - paper) > 1e-2 * alpha


def test_rpo_in_trl_depends_on_the_split_of_the_step(inputs):
    """The mean of TRL's two micro-batches, weighted by their pairs, is not its value for all; ours is the same."""
    step = inputs(POLICY, REFERENCE)
    loss = RPO(beta=0.4, alpha=1.0, **TOKENS)
    theirs = ours = 0.0
    for part in ([0, 1], [2, 3, 4, 5]):
        policy, reference = step.policy.select(part), step.reference.select(part)
        theirs += trl_weighted(LossInputs(policy, reference), {"sigmoid": 1.0, "sft": 1.0}).item() * len(part) / 6
        ours += loss(LossInputs(policy, reference, totals=step.step_totals())).losses.sum().item() / 3
    assert ours == pytest.approx(loss(step).losses.mean().item(), rel=1e-14)
    assert abs(theirs - ours) > 1e-2


def trl_cpo(model, batch, beta, lam, label_smoothing):
    trainer = bare(
        CPOTrainer,
        loss_type="sigmoid",
        is_encoder_decoder=False,
        pad_token_id=0,
        beta=beta,
        cpo_alpha=lam,
        label_smoothing=label_smoothing,
        alpha=0.0,
    )
    return trainer.get_batch_loss_metrics(model, batch)


@pytest.mark.parametrize(("beta", "lam", "smoothing"), [(0.1, 1.0, 0.0), (0.5, 0.3, 0.2), (0.1, 0.0, 0.0)])
def test_cpo(beta, lam, smoothing):
    """TRL's NLL is the batch's token mean, not the paper's sum."""
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    output = CPO(beta=beta, lam=lam, label_smoothing=smoothing, **TOKENS)(step)
    theirs, logged = trl_cpo(model, batch, beta, lam, smoothing)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, model.logits)
    assert logged["rewards/chosen"] == pytest.approx(output.rewards[0::2].mean().item())
    paper = CPO(beta=beta, lam=lam, label_smoothing=smoothing, **TOKENS | {"nll_reduction": NLLReduction.sequence_sum})
    assert paper(step).losses.mean().item() - theirs.item() >= 5 * lam


@pytest.mark.parametrize(("beta", "ratio", "alpha"), [(10.0, 0.54, 0.05), (2.0, 0.5, 1.0)])
def test_cpo_simpo(beta, ratio, alpha):
    """TRL takes gamma = beta * ratio."""
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    output = CPOSimPO(beta=beta, gamma_beta_ratio=ratio, alpha=alpha, **TOKENS)(step)
    theirs, logged = trl_simpo(model, batch, beta=beta, simpo_gamma=beta * ratio, cpo_alpha=alpha)
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
    generator = torch.Generator().manual_seed(0)
    items = len(lengths)
    rows = [lengths[i][k] for k in (1, 2, 0) for i in range(items)]
    shape = (len(rows), prompt + max(rows), VOCABULARY)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(VOCABULARY, shape[:2], generator=generator)
    positions = torch.arange(shape[1])
    attention = positions < prompt + torch.tensor(rows)[:, None]
    batch = {
        "input_ids": ids,
        "attention_mask": attention.long(),
        "completion_mask": (attention & (positions >= prompt)).long(),
    }
    logps = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    completions = [logps[row, prompt - 1 : prompt - 1 + n] for row, n in enumerate(rows)]
    best_first = [completions[k * items + i] for i in range(items) for k in (2, 0, 1)]
    step = LossInputs(RaggedLogps.from_sequences(best_first), sizes=torch.full((items,), 3))
    return logits, batch, step


@pytest.mark.parametrize("alpha", [0.05, 1.0])
@pytest.mark.parametrize("loss_type", ["sigmoid", "tpo-l"])
def test_tpo(loss_type, alpha):
    """TRL takes gamma, here 1.6 at beta 2; `reference` is its name for the gold answer."""
    logits, batch, step = triple_forward(3, [(4, 2, 5), (1, 6, 3)])

    def model(input_ids, **_):
        return SimpleNamespace(logits=logits)

    trainer = bare(
        TPOTrainer,
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        beta=2.0,
        tpo_alpha=alpha,
        tpo_l_gamma=1.6,
        label_smoothing=0.0,
    )
    theirs = trainer._compute_loss(model, batch, False)
    if loss_type == "sigmoid":
        output = TPO(beta=2.0, alpha=alpha, **TOKENS)(step)
    else:
        output = TPOL(beta=2.0, gamma_beta_ratio=0.8, alpha=alpha, **TOKENS)(step)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, logits)
    logged = trainer._metrics["train"]
    assert logged["rewards/chosen"] == pytest.approx([output.rewards[1::3].mean().item()])
    assert logged["rewards/rejected"] == pytest.approx([output.rewards[2::3].mean().item()])


def test_the_weighted_sum_by_hand(inputs):
    """TRL's code through the stub: the sum is that of its parts, so that parity cannot hold by a shared mistake."""
    step = inputs(POLICY, REFERENCE)
    dpo = DPO(beta=0.4, label_smoothing=0.0)(step).losses.mean().item()
    tokens = [x for sequence in POLICY[0::2] for x in sequence]
    expected = dpo - 0.5 * sum(tokens) / len(tokens)
    assert trl_weighted(step, {"sigmoid": 1.0, "sft": 0.5}).item() == pytest.approx(expected)
