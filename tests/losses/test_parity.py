"""The page of the losses compares with TRL: its numbers are those that TRL's own code gives.

`trl_stubs` says how TRL is run. `test_trl_parity` compares losses and gradients on more pairs; this is the one pair of
the page.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from alignment.losses import DPO, KTO, LossInputs
from alignment.losses.parity import ABSENT, CHECKS, GOLD, POLICY, step_of_the_pair
from alignment.types import RaggedLogps
from tests.helpers.trl_stubs import (
    PreparedLogits,
    side_by_side,
    trl_cpo,
    trl_dpo,
    trl_kto,
    trl_orpo,
    trl_reward,
    trl_tpo,
)

STEP = step_of_the_pair(DPO(beta=0.1, label_smoothing=0.0))


def dpo(losses, beta=0.1, dtype=torch.float64, **settings):
    def cast(logps):
        return RaggedLogps(logps.values.to(dtype), logps.offsets)

    step = replace(STEP, policy=cast(STEP.policy), reference=cast(STEP.reference))
    return trl_dpo(step, losses, beta, **settings)[0]


def forward_of(rows):
    """A model of two tokens that gives token 0 these log-probs, and TRL's batch for it.

    A prompt of one token stands before every row.
    """
    width = 1 + max(map(len, rows))
    logits = torch.zeros(len(rows), width, 2, dtype=torch.float64)
    lengths = torch.tensor([len(row) for row in rows])
    for i, row in enumerate(rows):
        logps = torch.tensor(row, dtype=torch.float64)
        logits[i, : len(row)] = torch.stack([logps, torch.log(-torch.expm1(logps))], dim=1)
    attention = torch.arange(width) <= lengths[:, None]
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    completion = attention & (torch.arange(width) > 0)
    batch = {"input_ids": ids, "attention_mask": attention.long(), "completion_mask": completion.long()}
    return PreparedLogits(logits), batch


def paired():
    """For the trainers that take chosen and rejected rows by these names."""
    model, batch = forward_of(POLICY)
    return model, side_by_side(batch)


def cpo(**settings):
    return trl_cpo(*paired(), **settings)[0]


def simpo(beta, gamma, **settings):
    return cpo(loss_type="simpo", beta=beta, simpo_gamma=gamma, **settings)


def tpo(**settings):
    return trl_tpo(*forward_of((*POLICY, GOLD)), **settings)[0]


def kto(loss_type="kto"):
    values = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    rows = step_of_the_pair(KTO(**values))
    return trl_kto(rows, LossInputs(rows.reference, rows.reference), [0, 1], loss_type, **values)[0]


def reward(margins=None):
    return trl_reward(STEP.policy.sums(), margins, center_rewards_coefficient=0.01)[0]


RUNS = {
    "DPO sigmoid": lambda: dpo("sigmoid"),
    "DPO sigmoid, label_smoothing 0.1": lambda: dpo("sigmoid", label_smoothing=0.1),
    "DPO robust, label_smoothing 0.1": lambda: dpo("robust", label_smoothing=0.1),
    "DPO ipo": lambda: dpo("ipo"),
    "DPO hinge": lambda: dpo("hinge"),
    "DPO hinge, beta 1": lambda: dpo("hinge", 1.0),
    "DPO bco_pair": lambda: dpo("bco_pair"),
    "DPO apo_zero": lambda: dpo("apo_zero"),
    "DPO apo_down": lambda: dpo("apo_down"),
    "DPO nca_pair": lambda: dpo("nca_pair"),
    "DPO exo_pair, label_smoothing 0.001": lambda: dpo("exo_pair", label_smoothing=1e-3),
    "DPO sppo_hard, beta 0.001": lambda: dpo("sppo_hard", 1e-3),
    "DPO discopop, beta 0.05, tau 0.05": lambda: dpo("discopop", 0.05, discopop_tau=0.05),
    "DPO sigmoid, forward_kl": lambda: dpo("sigmoid", f_divergence_type="forward_kl"),
    "DPO sigmoid, js_divergence": lambda: dpo("sigmoid", f_divergence_type="js_divergence"),
    **{
        f"DPO sigmoid, alpha_divergence, coefficient {alpha}": partial(
            dpo, "sigmoid", dtype=torch.float32, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha
        )
        for alpha in (0.5, 0.7)
    },
    "DPO sigmoid_norm, beta 5": lambda: dpo("sigmoid_norm", 5.0),
    "DPO sigmoid, ld_alpha 0.5": lambda: dpo("sigmoid", ld_alpha=0.5),
    "DPO sigmoid, use_weighting, beta 0.01": lambda: dpo("sigmoid", 0.01, use_weighting=True),
    "DPO aot": lambda: dpo("aot"),
    "DPO aot_unpaired": lambda: dpo("aot_unpaired"),
    "DPO sft": lambda: dpo("sft"),
    "DPO sigmoid + sft": lambda: dpo({"sigmoid": 1.0, "sft": 1.0}),
    "DPO 0.8 sigmoid + 0.2 bco_pair + sft": lambda: dpo({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),
    "CPO sigmoid": cpo,
    "CPO sigmoid, cpo_alpha 0": lambda: cpo(cpo_alpha=0.0),
    "CPO hinge, beta 1, cpo_alpha 0.1": lambda: cpo(loss_type="hinge", beta=1.0, cpo_alpha=0.1),
    "CPO simpo, beta 2, simpo_gamma 1": lambda: simpo(2.0, 1.0),
    "CPO simpo, beta 2, simpo_gamma 1, cpo_alpha 0": lambda: simpo(2.0, 1.0, cpo_alpha=0.0),
    "CPO simpo, beta 10, simpo_gamma 5.4, cpo_alpha 0.05": lambda: simpo(10.0, 5.4, cpo_alpha=0.05),
    "CPO alphapo, beta 2.5, simpo_gamma 0.1, alpha 0.25": lambda: simpo(2.5, 0.1, cpo_alpha=0.0, alpha=0.25),
    "ORPO": lambda: trl_orpo(*paired(), 0.1)[0],
    "TPO sigmoid, beta 0.01, tpo_alpha 1": lambda: tpo(beta=0.01),
    "TPO tpo-l, beta 2, tpo_l_gamma 1, tpo_alpha 1": lambda: tpo(loss_type="tpo-l", beta=2.0, tpo_l_gamma=1.0),
    "Reward, center_rewards_coefficient 0.01": reward,
    "Reward, center_rewards_coefficient 0.01, margin 1.5": partial(reward, torch.tensor([1.5], dtype=torch.float64)),
    "KTO": kto,
    "KTO apo_zero_unpaired": lambda: kto("apo_zero_unpaired"),
}
"""What the page says that TRL is asked for; its `alphapo` is its `simpo` with an alpha and without the NLL."""


@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c.trl != ABSENT], ids=lambda check: f"{check.loss.name} and {check.trl}"
)
def test_trl_gives_the_recorded_number(check):
    """To single precision, in which some of TRL's code works."""
    assert RUNS[check.trl]().item() == pytest.approx(check.trl_value, rel=1e-6, abs=1e-12)


def test_a_difference_is_explained():
    for check in CHECKS:
        assert (check.trl == ABSENT) == (check.trl_value is None)
        if check.trl_value is not None and check.trl_value != pytest.approx(check.formula, rel=1e-6, abs=1e-12):
            assert check.remark, check.loss
