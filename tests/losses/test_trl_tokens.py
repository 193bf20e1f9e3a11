"""LD-DPO, WPO and AOT against TRL's own code, run as in `test_trl_parity`."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from trl import DPOTrainer

from alignment.losses import AOT, DPO, LDDPO, WPO, AOTUnpaired, Quantity
from tests.losses.test_trl_parity import (
    POLICY,
    REFERENCE,
    PreparedLogProbs,
    assert_same_loss_and_gradient,
    bare,
    batch_of,
)

COLLISIONS = [
    [-0.9, -1.5, -0.45, -1.2],
    [-1.3, -0.9, -1.2, -0.45, -1.1, -1.4],
    [-0.5, -0.75],
    [-0.25, -0.5, -0.25, -0.5, -0.25],
    [-0.6],
    [-0.7, -0.9, -0.6],
]
"""The mean log-prob is above the mean collision in the first and last pair's completions, and below in the second's."""


class PreparedModel(PreparedLogProbs):
    """Answers with prepared log-probs and, where given, the logarithms of the distributions' sums of squares."""

    is_gradient_checkpointing = False
    _modules: ClassVar = {}  # asked for compiled parts

    def __init__(self, ragged, collisions=None):
        super().__init__(ragged)
        self.collisions = collisions

    def __call__(self, input_ids, **_):
        answer = super().__call__(input_ids)
        if self.collisions is not None:
            padded = pad_sequence([self.collisions.sequence(i) for i in range(len(self.collisions))], batch_first=True)
            answer.log_sum_sq_probs = padded[input_ids[:, 0]]
        return answer


def trl(step, loss_type, beta, label_smoothing=0.0, ld_alpha=None, use_weighting=False, pairs=None):
    """TRL's mean loss over these pairs as one micro-batch, the reference being run beside the policy."""
    pairs = range(len(step.policy) // 2) if pairs is None else pairs
    rows = [2 * i for i in pairs] + [2 * i + 1 for i in pairs]
    model = PreparedModel(step.policy, step.quantities.get(Quantity.collision))
    trainer = bare(
        DPOTrainer,
        model=model,
        ref_model=PreparedModel(step.reference),
        ld_alpha=ld_alpha,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=use_weighting,
    )
    return trainer._compute_loss(model, batch_of(step.policy, rows), False)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_ld_dpo(inputs, alpha):
    step = inputs(POLICY, REFERENCE)
    ours = LDDPO(beta=0.4, alpha=alpha)(step).losses.mean()
    assert_same_loss_and_gradient(ours, trl(step, "sigmoid", 0.4, ld_alpha=alpha), step.policy.values)


def test_ld_dpo_without_alpha_is_dpo(inputs):
    """The stub with a live reference, against a loss that is the same in both."""
    step = inputs(POLICY, REFERENCE)
    ours = DPO(beta=0.4, label_smoothing=0.0)(step).losses.mean()
    assert_same_loss_and_gradient(ours, trl(step, "sigmoid", 0.4), step.policy.values)


def test_wpo_has_no_limit_in_trl(inputs, ragged):
    """Pair by pair: the same loss where the weight is below 1, and that times the weight where it is above."""
    step = inputs(POLICY, REFERENCE, quantities={Quantity.collision: ragged(COLLISIONS)})
    output = WPO(beta=0.4)(step)
    above = (step.policy.values.detach() - step.quantities[Quantity.collision].values).tensor_split(
        step.policy.offsets[1:-1]
    )
    means = torch.stack([tokens.mean() for tokens in above])
    weights = (means[0::2] + means[1::2]).exp().tolist()
    assert [weight > 1 for weight in weights] == [True, False, False]
    for i, weight in enumerate(weights):
        theirs = trl(step, "sigmoid", 0.4, use_weighting=True, pairs=[i])
        assert_same_loss_and_gradient(max(weight, 1.0) * output.losses[i], theirs, step.policy.values)


@pytest.mark.parametrize(("kind", "name"), [(AOT, "aot"), (AOTUnpaired, "aot_unpaired")])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aot(inputs, kind, name, smoothing):
    step = inputs(POLICY, REFERENCE)
    ours = kind(beta=0.4, label_smoothing=smoothing)(step).losses.mean()
    assert_same_loss_and_gradient(ours, trl(step, name, 0.4, label_smoothing=smoothing), step.policy.values)
    dpo = DPO(beta=0.4, label_smoothing=smoothing)(step).losses.mean()
    assert abs((ours - dpo).item()) > 1e-3


@pytest.mark.parametrize(("kind", "name"), [(AOT, "aot"), (AOTUnpaired, "aot_unpaired")])
def test_aot_sorts_micro_batches_in_trl(inputs, kind, name):
    """Three pairs as two and one are another loss there; here a step's loss is that of all its pairs."""
    step = inputs(POLICY, REFERENCE)
    ours = kind(beta=0.4, label_smoothing=0.0)(step).losses.mean().item()
    split = (2 * trl(step, name, 0.4, pairs=[1, 2]).item() + trl(step, name, 0.4, pairs=[0]).item()) / 3
    assert abs(split - ours) > 1e-3
