"""Our losses against TRL's own code, and TRL's differences as differences.

`trl_stubs` says how TRL is run. The differences are those of TRL 1.16; a failure here after an upgrade means that TRL
has changed, and that the docstrings which state the difference must follow.
"""

from math import exp, log

import pytest
import torch
from trl.experimental.orpo.orpo_trainer import log1mexp

from alignment.losses import (
    DPO,
    EXO,
    FDPO,
    IPO,
    KTO,
    LNDPO,
    NCA,
    ORPO,
    SPPO,
    APODown,
    APOZero,
    APOZeroUnpaired,
    BCOPair,
    DiscoPOP,
    Hinge,
    RobustDPO,
    SimPO,
)
from alignment.losses.f_dpo import Divergence
from alignment.losses.ipo import Reduction
from tests.helpers.loss_examples import SEQUENCES
from tests.helpers.trl_stubs import (
    POLICY,
    REFERENCE,
    assert_same_loss_and_gradient,
    paired_forward,
    trl_cpo,
    trl_dpo,
    trl_kto,
    trl_orpo,
)

LABELS = [True, False, True, True, False, True]
KTO_VALUES = {"beta": 0.3, "desirable_weight": 1.33, "undesirable_weight": 0.7}


@pytest.mark.parametrize("beta", [0.1, 0.5, 5.0])
def test_dpo(inputs, beta):
    step = inputs(POLICY, REFERENCE)
    output = DPO(beta=beta, label_smoothing=0.0)(step)
    theirs, logged = trl_dpo(step, "sigmoid", beta)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, step.policy.values)
    assert logged["rewards/chosen"] == pytest.approx([output.rewards[0::2].mean().item()])
    assert logged["rewards/rejected"] == pytest.approx([output.rewards[1::2].mean().item()])


def test_sigmoid_ignores_label_smoothing(inputs):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_dpo(step, "sigmoid", 0.1, label_smoothing=0.1)
    plain = DPO(beta=0.1, label_smoothing=0.0)(step).losses.mean().item()
    smoothed = DPO(beta=0.1, label_smoothing=0.1)(step).losses.mean().item()
    assert theirs.item() == pytest.approx(plain, rel=1e-12)
    assert abs(theirs.item() - smoothed) > 1e-3


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_ipo_has_means(inputs, tau):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_dpo(step, "ipo", tau)
    assert_same_loss_and_gradient(
        IPO(tau=tau, reduction=Reduction.mean)(step).losses.mean(), theirs, step.policy.values
    )
    assert theirs.item() != pytest.approx(IPO(tau=tau, reduction=Reduction.sum)(step).losses.mean().item(), rel=1e-3)


def test_ipo_logs_another_reward_than_it_optimises(inputs):
    """Mean log-ratios 0.2 and 0.1 over 1 and 4 tokens: the pair is right per token and wrong by the sums 0.2, 0.4."""
    step = inputs([[-1.0], [-1.0] * 4], [[-1.2], [-1.1] * 4])
    _, logged = trl_dpo(step, "ipo", 0.1)
    chosen, rejected = IPO(tau=0.1, reduction=Reduction.mean)(step).rewards.tolist()
    assert (chosen, rejected) == pytest.approx((0.2, 0.1))
    assert (logged["rewards/chosen"], logged["rewards/rejected"]) == (pytest.approx([0.02]), pytest.approx([0.04]))
    assert logged["rewards/accuracies"] == [0.0]


SAME = {
    "robust": (RobustDPO(beta=0.4, flip_rate=0.2), {"label_smoothing": 0.2}),
    "hinge": (Hinge(beta=0.4), {}),
    "nca_pair": (NCA(beta=0.4), {}),
    "bco_pair": (BCOPair(beta=0.4), {}),
    "apo_zero": (APOZero(beta=0.4), {}),
    "apo_down": (APODown(beta=0.4), {}),
    "discopop": (DiscoPOP(beta=0.4, tau=0.05), {"discopop_tau": 0.05}),
    "sigmoid_norm": (LNDPO(beta=0.4), {}),
}


@pytest.mark.parametrize(("name", "loss", "settings"), [(n, *v) for n, v in SAME.items()], ids=SAME)
def test_the_same_loss_and_gradient(inputs, name, loss, settings):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_dpo(step, name, 0.4, **settings)
    assert_same_loss_and_gradient(loss(step).losses.mean(), theirs, step.policy.values)


def test_exo_has_its_epsilon_in_float32(inputs):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_dpo(step, "exo_pair", 0.4, label_smoothing=1e-3)
    ours = EXO(beta=0.4, epsilon=1e-3)(step).losses.mean()
    assert_same_loss_and_gradient(ours, theirs, step.policy.values, rel=1e-6)
    assert theirs.item() != ours.item()


def test_sppo_is_twice_the_authors(inputs):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_dpo(step, "sppo_hard", 0.01)
    assert_same_loss_and_gradient(2 * SPPO(beta=0.01)(step).losses.mean(), theirs, step.policy.values)


@pytest.mark.parametrize(
    ("name", "ours"), [("forward_kl", Divergence.forward_kl), ("js_divergence", Divergence.jensen_shannon)]
)
def test_divergences(inputs, name, ours):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_dpo(step, "sigmoid", 0.4, f_divergence_type=name)
    losses = FDPO(beta=0.4, divergence=ours, alpha=None)(step).losses
    assert_same_loss_and_gradient(losses.mean(), theirs, step.policy.values)


def test_the_alpha_of_the_alpha_divergence_is_the_other_way_round(inputs):
    """The paper's 0.3 is TRL's 0.7; and float64 has no limit there to be clamped at."""
    alpha_divergence = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}
    step = inputs(POLICY, REFERENCE, dtype=torch.float32)
    theirs, _ = trl_dpo(step, "sigmoid", 0.4, **alpha_divergence)
    ours, wrong = (FDPO(beta=0.4, divergence=Divergence.alpha, alpha=a)(step).losses.mean() for a in (0.3, 0.7))
    assert_same_loss_and_gradient(ours, theirs, step.policy.values, rel=1e-5)
    assert abs(theirs.item() - wrong.item()) > 1e-3
    with pytest.raises(KeyError):
        trl_dpo(inputs(POLICY, REFERENCE), "sigmoid", 0.4, **alpha_divergence)


def test_forward_kl_and_discopop_give_nan_at_large_margins(inputs):
    """In float32: infinity minus infinity there, and 0 times infinity; ours stay finite."""
    step = inputs([[-200.0], [-200.0]], [[-1.0], [-1.0]], dtype=torch.float32)
    assert trl_dpo(step, "sigmoid", 0.4, f_divergence_type="forward_kl")[0].isnan()
    assert FDPO(beta=0.4, divergence=Divergence.forward_kl, alpha=None)(step).losses.isfinite().all()
    step = inputs([[-400.0], [-1.0]], [[-1.0], [-1.0]], dtype=torch.float32)
    assert trl_dpo(step, "discopop", 0.4, discopop_tau=0.05)[0].isnan()
    assert DiscoPOP(beta=0.4, tau=0.05)(step).losses.isfinite().all()


def shifted(drift):
    """Mismatched log-probs whose log-ratio is `drift` for every row."""
    return [[-1.0 + d, -0.5] for d in drift], [[-1.0, -0.5] for _ in drift]


@pytest.mark.parametrize(
    ("drift", "z0"), [([0.9, -0.3, 0.6, 0.0, 1.2, 0.6], 0.5), ([-0.9, 0.3, -0.6, 0.0, -1.2, 0.6], 0.0)]
)
def test_kto(inputs, drift, z0):
    loss, step, mismatched = KTO(**KTO_VALUES), inputs(POLICY, REFERENCE, LABELS), inputs(*shifted(drift))
    output = loss(step, loss.step_statistics(mismatched))
    theirs, logged = trl_kto(step, mismatched, list(range(6)), **KTO_VALUES)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, step.policy.values)
    assert logged["kl"] == pytest.approx([z0], abs=1e-12)
    assert output.parts["kl"].tolist() == pytest.approx([z0] * 6, abs=1e-12)
    assert logged["rewards/chosen"] == pytest.approx([output.rewards[step.labels].mean().item()])


def test_kto_estimates_z0_per_micro_batch(inputs):
    """Ratios 0.9 in the first half and -0.6 in the second: TRL's z0 is 0.9, then 0; over the step it is 0.15."""
    loss, step = KTO(**KTO_VALUES), inputs(POLICY, REFERENCE, LABELS)
    mismatched = inputs(*shifted([0.9] * 3 + [-0.6] * 3))
    output = loss(step, loss.step_statistics(mismatched))
    (first, first_log), (second, second_log) = (
        trl_kto(step, mismatched, rows, **KTO_VALUES) for rows in ([0, 1, 2], [3, 4, 5])
    )
    assert (first_log["kl"], second_log["kl"]) == (pytest.approx([0.9]), pytest.approx([0.0]))
    assert output.parts["kl"].tolist() == pytest.approx([0.15] * 6)
    assert abs((first + second).item() / 2 - output.losses.mean().item()) > 1e-3


def test_apo_zero_unpaired(inputs):
    """TRL's KTO with that loss type: no baseline, whatever the mismatched rows say."""
    step, mismatched = inputs(POLICY, REFERENCE, LABELS), inputs(*shifted([0.9] * 6))
    output = APOZeroUnpaired(**KTO_VALUES)(step)
    theirs, logged = trl_kto(step, mismatched, list(range(6)), "apo_zero_unpaired", **KTO_VALUES)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, step.policy.values)
    assert logged["kl"] == [0.0]
    assert logged["rewards/rejected"] == pytest.approx([output.rewards[~step.labels].mean().item()])


@pytest.mark.parametrize(("beta", "ratio"), [(2.0, 0.5), (10.0, 0.3), (2.5, 0.0)])
def test_simpo(beta, ratio):
    """TRL takes gamma = beta * ratio."""
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    output = SimPO(beta=beta, gamma_beta_ratio=ratio)(step)
    theirs, logged = trl_cpo(model, batch, loss_type="simpo", beta=beta, simpo_gamma=beta * ratio, cpo_alpha=0.0)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, model.logits)
    assert logged["rewards/chosen"] == pytest.approx(output.rewards[0::2].mean().item())


def test_simpo_takes_gamma_and_not_the_ratio():
    """The ratio in gamma's place is another loss: at beta 2 a ratio of 0.5 would mean 0.25."""
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    theirs, _ = trl_cpo(model, batch, loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)
    halved, meant = (SimPO(beta=2.0, gamma_beta_ratio=r)(step).losses.mean().item() for r in (0.25, 0.5))
    assert theirs.item() == pytest.approx(halved, rel=1e-12)
    assert abs(theirs.item() - meant) > 1e-2


def test_simpo_by_default_has_an_nll_term_and_a_ratio_of_5():
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    theirs, _ = trl_cpo(model, batch, loss_type="simpo")
    preference = SimPO(beta=0.1, gamma_beta_ratio=5.0)(step).losses.mean().item()
    token_mean = -torch.cat([step.policy.sequence(0), step.policy.sequence(2)]).mean().item()
    assert theirs.item() == pytest.approx(preference + token_mean, rel=1e-12)


@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_orpo_where_no_prompt_token_is_scored(lam):
    """With prompts of one token and chosen completions of one length the NLL terms coincide. TRL casts to float32."""
    model, batch, step, _ = paired_forward(1, [4, 4], [3, 6])
    output = ORPO(lam=lam, **SEQUENCES)(step)
    theirs, logged = trl_orpo(model, batch, lam)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, model.logits, rel=2e-6)
    assert logged["nll_loss"] == pytest.approx(output.parts["nll"].mean().item(), rel=1e-6)
    assert logged["log_odds_chosen"] == pytest.approx(output.parts["log_odds"].mean().item(), rel=1e-5)
    assert logged["rewards/chosen"] == pytest.approx(lam * step.policy.means()[0::2].mean().item(), rel=1e-6)
    assert logged["rewards/chosen"] != pytest.approx(output.rewards[0::2].mean().item(), rel=1e-3)


@pytest.mark.parametrize(("prompt", "lengths"), [(4, [4, 4]), (1, [2, 6]), (4, [2, 6])])
def test_orpo_nll_covers_the_prompt_and_is_a_batch_mean(prompt, lengths):
    """The whole difference is the NLL: over prompt and response, and averaged over the batch's tokens."""
    model, batch, step, whole = paired_forward(prompt, lengths, [3, 6])
    output = ORPO(lam=0.1, **SEQUENCES)(step)
    theirs, _ = trl_orpo(model, batch, 0.1)
    difference = -torch.cat(whole).mean().item() - output.parts["nll"].mean().item()
    assert abs(difference) > 1e-3
    assert theirs.item() - output.losses.mean().item() == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize("mean", [-1e-8, 0.0])
def test_orpo_gradient_is_nan_next_to_certainty(mean, inputs):
    x = torch.tensor(mean, dtype=torch.float32, requires_grad=True)
    (theirs,) = torch.autograd.grad(log1mexp(x), x)
    assert theirs.isnan()
    step = inputs([[mean], [-1.0]], dtype=torch.float32)
    (ours,) = torch.autograd.grad(ORPO(lam=0.1, **SEQUENCES)(step).losses.sum(), step.policy.values)
    assert torch.isfinite(ours).all()


def test_the_stubs_by_hand(inputs):
    """TRL's code through the stubs against hand-derived values, so that parity cannot hold by a shared mistake.

    DPO: u = log 3, v = 0, beta 1 give log(4/3). KTO: u = log 6, z0 = log 2, so u - z0 = log 3 in both rows.
    """
    theirs, _ = trl_dpo(inputs([[log(3) - 1], [-1.0]], [[-1.0], [-1.0]]), "sigmoid", 1.0)
    assert theirs.item() == pytest.approx(log(4 / 3))
    rows = inputs([[log(6) - 3]] * 2, [[-3.0]] * 2, [True, True])
    theirs, _ = trl_kto(rows, inputs([[log(2) - 1]] * 2, [[-1.0]] * 2), [0, 1], **KTO_VALUES)
    assert theirs.item() == pytest.approx(1.33 / (1 + exp(0.3 * log(3))))
