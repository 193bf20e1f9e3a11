"""The page of the losses compares with TRL: its numbers are those that TRL's own code gives.

`test_trl_parity` says how TRL is run. It compares losses and gradients on more pairs; this is the one pair of the page.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.tpo import TPOTrainer

from alignment.losses import DPO, KTO, WPO, LossInputs
from alignment.losses.parity import ABSENT, CHECKS, GOLD, POLICY, step_of_the_pair
from alignment.ragged import RaggedLogps
from tests.losses.test_trl_anchored import trl_weighted
from tests.losses.test_trl_parity import bare, trl_orpo, trl_pairs, trl_rows
from tests.losses.test_trl_tokens import trl as trl_live

STEP = step_of_the_pair(DPO(beta=0.1, label_smoothing=0.0))


def pairs(loss_type, beta=0.1, dtype=torch.float64, **settings):
    """DPOTrainer's losses on log-probs."""

    def cast(logps):
        return RaggedLogps(logps.values.to(dtype), logps.offsets)

    return trl_pairs(LossInputs(cast(STEP.policy), cast(STEP.reference)), loss_type, beta, **settings)[0]


def of_logits(rows):
    """Logits over two tokens under which token 0 has the given log-probs, and TRL's ids, masks and labels for them.

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
    return logits, ids, attention.long(), completion


def paired():
    """A model and a batch for the trainers that read logits."""
    logits, ids, attention, completion = of_logits(POLICY)
    batch = {}
    for i, name in enumerate(("chosen", "rejected")):
        batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"] = ids[[i]], attention[[i]]
        batch[f"{name}_labels"] = torch.where(completion[[i]], ids[[i]], -100)
    return (lambda *_, **__: SimpleNamespace(logits=logits)), batch


def cpo(loss_type, beta=0.1, cpo_alpha=1.0, gamma=0.0, alpha=0.0):
    trainer = bare(
        CPOTrainer,
        loss_type=loss_type,
        is_encoder_decoder=False,
        pad_token_id=0,
        beta=beta,
        cpo_alpha=cpo_alpha,
        simpo_gamma=gamma,
        alpha=alpha,
        label_smoothing=0.0,
    )
    return trainer.get_batch_loss_metrics(*paired())[0]


def tpo(loss_type, beta, gamma):
    logits, ids, attention, completion = of_logits((*POLICY, GOLD))
    batch = {"input_ids": ids, "attention_mask": attention, "completion_mask": completion.long()}
    trainer = bare(
        TPOTrainer,
        model=SimpleNamespace(training=True),
        loss_type=loss_type,
        beta=beta,
        tpo_alpha=1.0,
        tpo_l_gamma=gamma,
        label_smoothing=0.0,
    )
    return trainer._compute_loss(lambda **_: SimpleNamespace(logits=logits), batch, False)


def kto():
    values = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    rows = step_of_the_pair(KTO(**values))
    return trl_rows(rows, LossInputs(rows.reference, rows.reference), [0, 1], values)[0]


RUNS = {
    "DPO sigmoid": lambda: pairs("sigmoid"),
    "DPO sigmoid, label_smoothing 0.1": lambda: pairs("sigmoid", label_smoothing=0.1),
    "DPO robust, label_smoothing 0.1": lambda: pairs("robust", label_smoothing=0.1),
    "DPO ipo": lambda: pairs("ipo"),
    "DPO hinge": lambda: pairs("hinge"),
    "DPO hinge, beta 1": lambda: pairs("hinge", 1.0),
    "DPO bco_pair": lambda: pairs("bco_pair"),
    "DPO apo_zero": lambda: pairs("apo_zero"),
    "DPO apo_down": lambda: pairs("apo_down"),
    "DPO nca_pair": lambda: pairs("nca_pair"),
    "DPO exo_pair, label_smoothing 0.001": lambda: pairs("exo_pair", label_smoothing=1e-3),
    "DPO sppo_hard, beta 0.001": lambda: pairs("sppo_hard", 1e-3),
    "DPO discopop, beta 0.05, tau 0.05": lambda: pairs("discopop", 0.05, tau=0.05),
    "DPO sigmoid, forward_kl": lambda: pairs("sigmoid", divergence="forward_kl"),
    "DPO sigmoid, js_divergence": lambda: pairs("sigmoid", divergence="js_divergence"),
    **{
        f"DPO sigmoid, alpha_divergence, coefficient {alpha}": partial(
            pairs, "sigmoid", dtype=torch.float32, divergence="alpha_divergence", alpha=alpha
        )
        for alpha in (0.5, 0.7)
    },
    "DPO sigmoid_norm, beta 5": lambda: pairs("sigmoid_norm", 5.0),
    "DPO sigmoid, ld_alpha 0.5": lambda: trl_live(STEP, "sigmoid", 0.1, ld_alpha=0.5),
    "DPO sigmoid, use_weighting, beta 0.01": lambda: trl_live(
        step_of_the_pair(WPO(beta=0.01)), "sigmoid", 0.01, use_weighting=True
    ),
    "DPO aot": lambda: trl_live(STEP, "aot", 0.1),
    "DPO aot_unpaired": lambda: trl_live(STEP, "aot_unpaired", 0.1),
    "DPO sft": lambda: trl_weighted(STEP, {"sft": 1.0}, 0.1),
    "DPO sigmoid + sft": lambda: trl_weighted(STEP, {"sigmoid": 1.0, "sft": 1.0}, 0.1),
    "DPO 0.8 sigmoid + 0.2 bco_pair + sft": lambda: trl_weighted(
        STEP, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, 0.1
    ),
    "CPO sigmoid": lambda: cpo("sigmoid"),
    "CPO sigmoid, cpo_alpha 0": lambda: cpo("sigmoid", cpo_alpha=0.0),
    "CPO hinge, beta 1, cpo_alpha 0.1": lambda: cpo("hinge", 1.0, cpo_alpha=0.1),
    "CPO simpo, beta 2, simpo_gamma 1": lambda: cpo("simpo", 2.0, gamma=1.0),
    "CPO simpo, beta 2, simpo_gamma 1, cpo_alpha 0": lambda: cpo("simpo", 2.0, cpo_alpha=0.0, gamma=1.0),
    "CPO simpo, beta 10, simpo_gamma 5.4, cpo_alpha 0.05": lambda: cpo("simpo", 10.0, cpo_alpha=0.05, gamma=5.4),
    "CPO alphapo, beta 2.5, simpo_gamma 0.1, alpha 0.25": lambda: cpo("simpo", 2.5, 0.0, gamma=0.1, alpha=0.25),
    "ORPO": lambda: trl_orpo(*paired(), 0.1)[0],
    "TPO sigmoid, beta 0.01, tpo_alpha 1": lambda: tpo("sigmoid", 0.01, 0.0),
    "TPO tpo-l, beta 2, tpo_l_gamma 1, tpo_alpha 1": lambda: tpo("tpo-l", 2.0, 1.0),
    "KTO": kto,
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
