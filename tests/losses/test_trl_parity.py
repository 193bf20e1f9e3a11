"""Our losses against TRL's own code, and TRL's differences as differences.

TRL computes its losses inside trainer methods. Each trainer here is made without its constructor, given the few
attributes that those methods read and a model that answers with prepared log-probs or logits, so that the mathematics
that runs is TRL's, unchanged. The differences are those of TRL 1.16; a failure here after an upgrade means that
TRL has changed, and that the docstrings which state the difference must follow.
"""

from collections import defaultdict
from dataclasses import fields
from math import exp, log
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOTrainer
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
    BCOPair,
    DiscoPOP,
    Hinge,
    LossInputs,
    RobustDPO,
    SimPO,
)
from alignment.losses.f_dpo import Divergence
from alignment.losses.ipo import Reduction
from alignment.ragged import RaggedLogps
from tests.losses.examples import SEQUENCES

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)

POLICY = [
    [-0.5, -1.0, -0.25, -0.75],
    [-1.0, -0.5, -1.5, -0.25, -0.75, -1.0],
    [-2.0, -1.5],
    [-0.2, -0.1, -0.3, -0.2, -0.4],
    [-0.9],
    [-1.1, -0.7, -0.8],
]
REFERENCE = [
    [-0.75, -1.25, -0.5, -0.5],
    [-0.5, -0.5, -1.0, -0.5, -0.75, -0.95],
    [-1.0, -1.1],
    [-0.9, -0.4, -0.8, -0.6, -0.5],
    [-0.8],
    [-1.0, -0.9, -0.7],
]
"""Three pairs for the pairwise losses, six rows for KTO; the second pair prefers the rejected completion."""


def bare(trainer_class, **attributes):
    """A trainer without its constructor, on one CPU process."""
    trainer = trainer_class.__new__(trainer_class)
    defaults = {"accelerator": ACCELERATOR, "aux_loss_enabled": False, "_metrics": {"train": defaultdict(list)}}
    for key, value in (defaults | {"_total_train_tokens": 0, "_tp_size": 1} | attributes).items():
        setattr(trainer, key, value)
    return trainer


class PreparedLogProbs:
    """A model whose per-token log-probs are given; the first input id of a row says which sequence is asked for."""

    training = True

    def __init__(self, ragged):
        self.table = pad_sequence([ragged.sequence(i) for i in range(len(ragged))], batch_first=True)

    def __call__(self, input_ids, **_):
        log_probs = self.table[input_ids[:, 0]]
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def batch_of(ragged, rows):
    """TRL's tensors for a prompt of one token, its id the row, and the completions of the given rows."""
    width = int(ragged.lengths.max())
    mask = (torch.arange(width + 1) > 0) & (torch.arange(width + 1) <= ragged.lengths[rows, None])
    ids = torch.zeros(len(rows), width + 1, dtype=torch.int64)
    ids[:, 0] = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": mask | (torch.arange(width + 1) == 0), "completion_mask": mask.long()}


def trl_pairs(step, loss_type, beta, label_smoothing=0.0, divergence="reverse_kl", alpha=None, tau=None):
    """TRL's mean loss over the pairs of a step, and what it logs."""
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
        f_divergence_type=divergence,
        f_alpha_divergence_coef=alpha,
        args=SimpleNamespace(discopop_tau=tau),
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
    )
    return trainer._compute_loss(model, batch, False), trainer._metrics["train"]


def assert_same_loss_and_gradient(ours, theirs, leaf, rel=1e-12):
    assert theirs.item() == pytest.approx(ours.item(), rel=rel)
    (our_gradient,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    (their_gradient,) = torch.autograd.grad(theirs, leaf, retain_graph=True)
    assert our_gradient.abs().max() > 1e-3
    torch.testing.assert_close(their_gradient, our_gradient, rtol=rel, atol=rel)


@pytest.mark.parametrize("beta", [0.1, 0.5, 5.0])
def test_dpo(inputs, beta):
    step = inputs(POLICY, REFERENCE)
    output = DPO(beta=beta, label_smoothing=0.0)(step)
    theirs, logged = trl_pairs(step, "sigmoid", beta)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, step.policy.values)
    assert logged["rewards/chosen"] == pytest.approx([output.rewards[0::2].mean().item()])
    assert logged["rewards/rejected"] == pytest.approx([output.rewards[1::2].mean().item()])


def test_sigmoid_ignores_label_smoothing(inputs):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_pairs(step, "sigmoid", 0.1, label_smoothing=0.1)
    plain = DPO(beta=0.1, label_smoothing=0.0)(step).losses.mean().item()
    smoothed = DPO(beta=0.1, label_smoothing=0.1)(step).losses.mean().item()
    assert theirs.item() == pytest.approx(plain, rel=1e-12)
    assert abs(theirs.item() - smoothed) > 1e-3


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
def test_ipo_has_means(inputs, tau):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_pairs(step, "ipo", tau)
    assert_same_loss_and_gradient(
        IPO(tau=tau, reduction=Reduction.mean)(step).losses.mean(), theirs, step.policy.values
    )
    assert theirs.item() != pytest.approx(IPO(tau=tau, reduction=Reduction.sum)(step).losses.mean().item(), rel=1e-3)


def test_ipo_logs_another_reward_than_it_optimises(inputs):
    """Mean log-ratios 0.2 and 0.1 over 1 and 4 tokens: the pair is right per token and wrong by the sums 0.2, 0.4."""
    step = inputs([[-1.0], [-1.0] * 4], [[-1.2], [-1.1] * 4])
    _, logged = trl_pairs(step, "ipo", 0.1)
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
    "discopop": (DiscoPOP(beta=0.4, tau=0.05), {"tau": 0.05}),
    "sigmoid_norm": (LNDPO(beta=0.4), {}),
}


@pytest.mark.parametrize(("name", "loss", "settings"), [(n, *v) for n, v in SAME.items()], ids=SAME)
def test_the_same_loss_and_gradient(inputs, name, loss, settings):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_pairs(step, name, 0.4, **settings)
    assert_same_loss_and_gradient(loss(step).losses.mean(), theirs, step.policy.values)


def test_exo_has_its_epsilon_in_float32(inputs):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_pairs(step, "exo_pair", 0.4, label_smoothing=1e-3)
    ours = EXO(beta=0.4, epsilon=1e-3)(step).losses.mean()
    assert_same_loss_and_gradient(ours, theirs, step.policy.values, rel=1e-6)
    assert theirs.item() != ours.item()


def test_sppo_is_twice_the_authors(inputs):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_pairs(step, "sppo_hard", 0.01)
    assert_same_loss_and_gradient(2 * SPPO(beta=0.01)(step).losses.mean(), theirs, step.policy.values)


@pytest.mark.parametrize(
    ("name", "ours"), [("forward_kl", Divergence.forward_kl), ("js_divergence", Divergence.jensen_shannon)]
)
def test_divergences(inputs, name, ours):
    step = inputs(POLICY, REFERENCE)
    theirs, _ = trl_pairs(step, "sigmoid", 0.4, divergence=name)
    losses = FDPO(beta=0.4, divergence=ours, alpha=None)(step).losses
    assert_same_loss_and_gradient(losses.mean(), theirs, step.policy.values)


def test_the_alpha_of_the_alpha_divergence_is_the_other_way_round(inputs):
    """The paper's 0.3 is TRL's 0.7; and float64 has no limit there to be clamped at."""
    step = inputs(POLICY, REFERENCE, dtype=torch.float32)
    theirs, _ = trl_pairs(step, "sigmoid", 0.4, divergence="alpha_divergence", alpha=0.7)
    ours, wrong = (FDPO(beta=0.4, divergence=Divergence.alpha, alpha=a)(step).losses.mean() for a in (0.3, 0.7))
    assert_same_loss_and_gradient(ours, theirs, step.policy.values, rel=1e-5)
    assert abs(theirs.item() - wrong.item()) > 1e-3
    with pytest.raises(KeyError):
        trl_pairs(inputs(POLICY, REFERENCE), "sigmoid", 0.4, divergence="alpha_divergence", alpha=0.7)


def test_forward_kl_and_discopop_give_nan_at_large_margins(inputs):
    """In float32: infinity minus infinity there, and 0 times infinity; ours stay finite."""
    step = inputs([[-200.0], [-200.0]], [[-1.0], [-1.0]], dtype=torch.float32)
    assert trl_pairs(step, "sigmoid", 0.4, divergence="forward_kl")[0].isnan()
    assert FDPO(beta=0.4, divergence=Divergence.forward_kl, alpha=None)(step).losses.isfinite().all()
    step = inputs([[-400.0], [-1.0]], [[-1.0], [-1.0]], dtype=torch.float32)
    assert trl_pairs(step, "discopop", 0.4, tau=0.05)[0].isnan()
    assert DiscoPOP(beta=0.4, tau=0.05)(step).losses.isfinite().all()


LABELS = [True, False, True, True, False, True]
KTO_VALUES = {"beta": 0.3, "desirable_weight": 1.33, "undesirable_weight": 0.7}


def trl_rows(step, mismatched, rows, values=KTO_VALUES):
    """TRL's mean KTO loss over the given rows as one micro-batch, and what it logs."""
    joined = RaggedLogps.from_sequences(
        [r.sequence(i) for r in (step.policy, mismatched.policy) for i in range(len(r))]
    )
    batch, kl = batch_of(joined, rows), batch_of(joined, [len(step.policy) + i for i in rows])
    batch |= {f"KL_{key}": value for key, value in kl.items()}
    batch |= {"label": step.labels[rows]}
    batch |= {"ref_logps": step.reference.sums()[rows], "ref_KL_logps": mismatched.reference.sums()[rows]}
    model = PreparedLogProbs(joined)
    trainer = bare(KTOTrainer, model=model, calculate_KL=True, precompute_ref_logps=True, loss_type="kto", **values)
    return trainer._compute_loss(model, batch, False), trainer._metrics["train"]


def shifted(drift):
    """Mismatched log-probs whose log-ratio is `drift` for every row."""
    return [[-1.0 + d, -0.5] for d in drift], [[-1.0, -0.5] for _ in drift]


@pytest.mark.parametrize(
    ("drift", "z0"), [([0.9, -0.3, 0.6, 0.0, 1.2, 0.6], 0.5), ([-0.9, 0.3, -0.6, 0.0, -1.2, 0.6], 0.0)]
)
def test_kto(inputs, drift, z0):
    loss, step, mismatched = KTO(**KTO_VALUES), inputs(POLICY, REFERENCE, LABELS), inputs(*shifted(drift))
    output = loss(step, loss.statistics(mismatched))
    theirs, logged = trl_rows(step, mismatched, list(range(6)))
    assert_same_loss_and_gradient(output.losses.mean(), theirs, step.policy.values)
    assert logged["kl"] == pytest.approx([z0], abs=1e-12)
    assert output.parts["kl"].tolist() == pytest.approx([z0] * 6, abs=1e-12)
    assert logged["rewards/chosen"] == pytest.approx([output.rewards[step.labels].mean().item()])


def test_kto_estimates_z0_per_micro_batch(inputs):
    """Ratios 0.9 in the first half and -0.6 in the second: TRL's z0 is 0.9, then 0; over the step it is 0.15."""
    loss, step = KTO(**KTO_VALUES), inputs(POLICY, REFERENCE, LABELS)
    mismatched = inputs(*shifted([0.9] * 3 + [-0.6] * 3))
    output = loss(step, loss.statistics(mismatched))
    (first, first_log), (second, second_log) = (trl_rows(step, mismatched, rows) for rows in ([0, 1, 2], [3, 4, 5]))
    assert (first_log["kl"], second_log["kl"]) == (pytest.approx([0.9]), pytest.approx([0.0]))
    assert output.parts["kl"].tolist() == pytest.approx([0.15] * 6)
    assert abs((first + second).item() / 2 - output.losses.mean().item()) > 1e-3


VOCABULARY = 7


class PreparedLogits:
    """A model with given logits (rows, width, vocabulary)."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, input_ids, **_):
        assert input_ids.shape == self.logits.shape[:2]
        return SimpleNamespace(logits=self.logits)


def paired_forward(prompt, chosen_lengths, rejected_lengths):
    """TRL's batch for random tokens, a model for it, and our inputs from the same logits.

    Returns the model, the batch, our `LossInputs`, and the chosen rows' log-probs of all tokens but the first, prompt
    included.
    """
    generator = torch.Generator().manual_seed(0)
    width = prompt + max(chosen_lengths + rejected_lengths)
    lengths = chosen_lengths + rejected_lengths
    shape = (len(lengths), width, VOCABULARY)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(VOCABULARY, shape[:2], generator=generator)
    positions = torch.arange(width)
    batch = {}
    for name, rows in (("chosen", slice(0, len(lengths) // 2)), ("rejected", slice(len(lengths) // 2, None))):
        attention = positions < prompt + torch.tensor(lengths[rows])[:, None]
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = ids[rows], attention.long()
        batch[f"{name}_labels"] = torch.where(attention & (positions >= prompt), ids[rows], -100)
    logps = torch.log_softmax(logits, -1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    completions = [logps[i, prompt - 1 : prompt - 1 + n] for i, n in enumerate(lengths)]
    pairs = len(lengths) // 2
    ours = RaggedLogps.from_sequences([completions[i] for pair in range(pairs) for i in (pair, pair + pairs)])
    whole = [logps[i, : prompt - 1 + n] for i, n in enumerate(chosen_lengths)]
    return PreparedLogits(logits), batch, LossInputs(ours), whole


def trl_simpo(model, batch, **changes):
    defaults = {f.name: f.default for f in fields(CPOConfig)}
    values = {key: defaults[key] for key in ("beta", "label_smoothing", "cpo_alpha", "simpo_gamma", "alpha")}
    trainer = bare(CPOTrainer, loss_type="simpo", is_encoder_decoder=False, pad_token_id=0, **(values | changes))
    return trainer.get_batch_loss_metrics(model, batch)


@pytest.mark.parametrize(("beta", "ratio"), [(2.0, 0.5), (10.0, 0.3), (2.5, 0.0)])
def test_simpo(beta, ratio):
    """TRL takes gamma = beta * ratio."""
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    output = SimPO(beta=beta, gamma_beta_ratio=ratio)(step)
    theirs, logged = trl_simpo(model, batch, beta=beta, simpo_gamma=beta * ratio, cpo_alpha=0.0)
    assert_same_loss_and_gradient(output.losses.mean(), theirs, model.logits)
    assert logged["rewards/chosen"] == pytest.approx(output.rewards[0::2].mean().item())


def test_simpo_takes_gamma_and_not_the_ratio():
    """The ratio in gamma's place is another loss: at beta 2 a ratio of 0.5 would mean 0.25."""
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    theirs, _ = trl_simpo(model, batch, beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0)
    halved, meant = (SimPO(beta=2.0, gamma_beta_ratio=r)(step).losses.mean().item() for r in (0.25, 0.5))
    assert theirs.item() == pytest.approx(halved, rel=1e-12)
    assert abs(theirs.item() - meant) > 1e-2


def test_simpo_by_default_has_an_nll_term_and_a_ratio_of_5():
    model, batch, step, _ = paired_forward(3, [2, 5], [4, 1])
    theirs, _ = trl_simpo(model, batch)
    preference = SimPO(beta=0.1, gamma_beta_ratio=5.0)(step).losses.mean().item()
    token_mean = -torch.cat([step.policy.sequence(0), step.policy.sequence(2)]).mean().item()
    assert theirs.item() == pytest.approx(preference + token_mean, rel=1e-12)


def trl_orpo(model, batch, lam):
    trainer = bare(ORPOTrainer, beta=lam, is_encoder_decoder=False, padding_value=0)
    return trainer.get_batch_loss_metrics(model, batch)


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
    theirs, _ = trl_pairs(inputs([[log(3) - 1], [-1.0]], [[-1.0], [-1.0]]), "sigmoid", 1.0)
    assert theirs.item() == pytest.approx(log(4 / 3))
    rows = inputs([[log(6) - 3]] * 2, [[-3.0]] * 2, [True, True])
    theirs, _ = trl_rows(rows, inputs([[log(2) - 1]] * 2, [[-1.0]] * 2), [0, 1])
    assert theirs.item() == pytest.approx(1.33 / (1 + exp(0.3 * log(3))))
