"""The parity table: the value of each loss on one pair of completions, by its formula, here and in TRL 1.16.

The page of the losses prints this table, and the tests run TRL again. Add a line for a loss once you have worked out
its value without this package, from the paper's formula or with its authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignment.losses import (
    AOT,
    BCO,
    CPO,
    DPO,
    DPOP,
    EXO,
    FDPO,
    GPO,
    IPO,
    KTO,
    LDDPO,
    LNDPO,
    NCA,
    NLL,
    ODPO,
    ORPO,
    RDPO,
    RPO,
    SPPO,
    TDPO1,
    TDPO2,
    TPO,
    TPOL,
    WPO,
    AlphaPO,
    AOTUnpaired,
    APODown,
    APOZero,
    APOZeroUnpaired,
    BCOPair,
    BestVsRest,
    BradleyTerry,
    CalDPO,
    CPOSimPO,
    DiscoPOP,
    Hinge,
    Loss,
    LossInputs,
    MallowsPO,
    Mixture,
    PlackettLuce,
    Quantity,
    RePO,
    RobustDPO,
    SimPO,
    SLiCHF,
)
from alignment.losses.f_dpo import Divergence
from alignment.losses.gpo import Shape
from alignment.losses.ipo import Reduction
from alignment.losses.nll import NLLReduction, NLLScope
from alignment.types import RaggedLogps

POLICY = ((-0.5, -1.0, -0.25, -0.75), (-1.0, -0.5, -1.5, -0.25, -0.75, -1.0))
REFERENCE = ((-0.75, -1.25, -0.5, -0.5), (-0.5, -0.5, -1.0, -0.5, -0.75, -0.95))
"""Log-probs of the tokens of the chosen and of the rejected completion."""

COLLISION = ((-0.9, -1.5, -0.45, -1.2), (-1.3, -0.9, -1.2, -0.45, -1.1, -1.4))
DIVERGENCE = ((0.075,) * 4, (0.1, 0.1, 0.1, 0.1, 0.1, 0.2))
ENTROPY = ((0.5,) * 4, (0.5,) * 6)
SCORES = (4.5, 3.0)
GOLD = (-1.25,)
"""Log-probs of a gold answer, for losses of three."""

ABSENT = ""


@dataclass(frozen=True, slots=True)
class Check:
    """One loss on the pair.

    Attributes:
        loss: with the settings of this check.
        formula: its value by the formula of the paper or of the authors' code, to ten digits.
        trl: the settings of TRL 1.16 for the same loss, or `ABSENT`.
        trl_value: the value that TRL gives.
        remark: where and why values or behaviour differ.
    """

    loss: Loss
    formula: float
    trl: str = ABSENT
    trl_value: float | None = None
    remark: str = ""


def _ragged(sequences: tuple[tuple[float, ...], ...]) -> RaggedLogps:
    return RaggedLogps.from_sequences([torch.tensor(sequence, dtype=torch.float64) for sequence in sequences])


def step_of_the_pair(loss: Loss) -> LossInputs:
    """The pair in the form that the loss reads, in float64: a pair, two labelled rows, or a list."""
    unit = loss.requirements().unit
    quantities = {Quantity.collision: COLLISION, Quantity.divergence: DIVERGENCE, Quantity.entropy: ENTROPY}
    seeds = torch.zeros(2 if unit == "row" else 1, dtype=torch.int64)
    if isinstance(loss, TPO | TPOL):
        return LossInputs(_ragged((GOLD, *POLICY)), sizes=torch.tensor([3]), seeds=seeds)
    return LossInputs(
        _ragged(POLICY),
        _ragged(REFERENCE),
        labels=torch.tensor([True, False]) if unit == "row" else None,
        sizes=torch.tensor([2]) if unit == "list" else None,
        scores=torch.tensor(SCORES, dtype=torch.float64),
        quantities={quantity: _ragged(values) for quantity, values in quantities.items()},
        state=loss.initial_state(),
        seeds=seeds,
    )


def value_here(loss: Loss) -> float:
    """The value of this package: the mean over the items, with a mismatched baseline (KTO) of 0."""
    reference = _ragged(REFERENCE)
    step_statistics: Tensor | None = loss.step_statistics(LossInputs(reference, reference))
    return loss(step_of_the_pair(loss), step_statistics).losses.mean().item()


_TOKENS: dict[str, Any] = {"nll_reduction": NLLReduction.token_mean, "nll_scope": NLLScope.response}
_SEQUENCES: dict[str, Any] = {"nll_reduction": NLLReduction.sequence_mean, "nll_scope": NLLScope.response}
_SUM: dict[str, Any] = {"nll_reduction": NLLReduction.sequence_sum, "nll_scope": NLLScope.response}

_MICRO_BATCH = "TRL sorts each micro-batch of each process by itself"
_TOKEN_MEAN = "TRL's NLL is the token mean of a micro-batch: the same for one pair, not for several"

CHECKS: tuple[Check, ...] = (
    Check(DPO(beta=0.1, label_smoothing=0.0), 0.6302581947, "DPO sigmoid", 0.6302581947),
    Check(
        DPO(beta=0.1, label_smoothing=0.1),
        0.6432581947,
        "DPO sigmoid, label_smoothing 0.1",
        0.6302581947,
        "TRL's sigmoid has ignored label_smoothing since 0.29, so it has no conservative DPO",
    ),
    Check(RobustDPO(beta=0.1, flip_rate=0.1), 0.6140081947, "DPO robust, label_smoothing 0.1", 0.6140081947),
    Check(
        IPO(tau=0.1, reduction=Reduction.mean),
        22.48340278,
        "DPO ipo",
        22.48340278,
        "TRL logs beta times sums as rewards, whose margin can disagree with the one that is optimised",
    ),
    Check(
        IPO(tau=0.1, reduction=Reduction.sum),
        13.69,
        "DPO ipo",
        22.48340278,
        "the formula as printed; TRL has means only, on the authors' word",
    ),
    Check(Hinge(beta=0.1), 0.87, "DPO hinge", 0.87, "this is RSO's hinge with a reference, not SLiC-HF's"),
    Check(Hinge(beta=1.0), 0.0, "DPO hinge, beta 1", 0.0),
    Check(
        SLiCHF(delta=1.0, lam=0.1),
        0.25,
        "CPO hinge, beta 1, cpo_alpha 0.1",
        0.0625,
        "TRL's NLL is a token mean, the paper's a sum; delta is 1 over its beta",
    ),
    Check(GPO(beta=2.0, shape=Shape.squared), 2.56),
    Check(GPO(beta=2.0, shape=Shape.exponential), 0.07427357821),
    Check(GPO(beta=2.0, shape=Shape.truncated_quadratic), 0.0),
    Check(GPO(beta=2.0, shape=Shape.savage), 0.004780121168),
    Check(
        SimPO(beta=2.0, gamma_beta_ratio=0.5),
        1.026758839,
        "CPO simpo, beta 2, simpo_gamma 1, cpo_alpha 0",
        1.026758839,
        "TRL takes gamma instead of gamma / beta",
    ),
    Check(
        CPOSimPO(beta=2.0, gamma_beta_ratio=0.5, alpha=1.0, **_TOKENS),
        1.651758839,
        "CPO simpo, beta 2, simpo_gamma 1",
        1.651758839,
        "TRL's simpo as it comes is CPO-SimPO, since cpo_alpha is 1 unless set",
    ),
    Check(
        CPOSimPO(beta=10.0, gamma_beta_ratio=0.54, alpha=0.05, **_TOKENS),
        3.383547813,
        "CPO simpo, beta 10, simpo_gamma 5.4, cpo_alpha 0.05",
        3.383547813,
        _TOKEN_MEAN,
    ),
    Check(
        AlphaPO(beta=2.5, gamma_beta_ratio=0.04, alpha=0.25),
        0.4646924416,
        "CPO alphapo, beta 2.5, simpo_gamma 0.1, alpha 0.25",
        0.4646924416,
        "TRL takes gamma instead of gamma / beta, and powers of probabilities that underflow to 0",
    ),
    Check(RePO(gamma=0.5), 0.2916666667),
    Check(
        CPO(beta=0.1, lam=0.0, label_smoothing=0.0, **_TOKENS), 0.5759394199, "CPO sigmoid, cpo_alpha 0", 0.5759394199
    ),
    Check(CPO(beta=0.1, lam=1.0, label_smoothing=0.0, **_TOKENS), 1.20093942, "CPO sigmoid", 1.20093942, _TOKEN_MEAN),
    Check(
        CPO(beta=0.1, lam=1.0, label_smoothing=0.0, **_SUM),
        3.07593942,
        "CPO sigmoid",
        1.20093942,
        "the paper's NLL is a sum; its authors' code and TRL have a token mean",
    ),
    Check(
        ORPO(lam=0.1, **_SEQUENCES),
        0.676125384,
        "ORPO",
        0.6761253886,
        "TRL and the authors' code take the NLL over the prompt too; here the prompt has no token that is predicted",
    ),
    Check(NLL(**_TOKENS), 0.625, "DPO sft", 0.625, _TOKEN_MEAN),
    Check(
        RPO(beta=0.1, alpha=1.0, **_SEQUENCES),
        1.255258195,
        "DPO sigmoid + sft",
        1.255258195,
        _TOKEN_MEAN,
    ),
    Check(
        TPO(beta=0.01, alpha=1.0, **_TOKENS),
        1.930725304,
        "TPO sigmoid, beta 0.01, tpo_alpha 1",
        1.930725304,
        _TOKEN_MEAN,
    ),
    Check(
        TPOL(beta=2.0, gamma_beta_ratio=0.5, alpha=1.0, **_TOKENS),
        2.276758839,
        "TPO tpo-l, beta 2, tpo_l_gamma 1, tpo_alpha 1",
        2.276758839,
        "TRL takes gamma instead of gamma / beta",
    ),
    Check(
        KTO(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
        0.4837566317,
        "KTO",
        0.4837566317,
        "z0 is 0 here; TRL estimates it from a micro-batch, here it covers the step",
    ),
    Check(
        BCO(beta=0.1, density_weights=False),
        0.6611752126,
        ABSENT,
        None,
        "the first step: delta is the mean of its two rewards; TRL 1.16 has only bco_pair",
    ),
    Check(BCOPair(beta=0.1), 1.322406615, "DPO bco_pair", 1.322406615, "the paper's running mean delta is 0 in both"),
    Check(APOZero(beta=0.1), 0.9675132634, "DPO apo_zero", 0.9675132634),
    Check(APODown(beta=0.1), 0.9800430901, "DPO apo_down", 0.9800430901),
    Check(
        APOZeroUnpaired(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0),
        0.4837566317,
        "KTO apo_zero_unpaired",
        0.4837566317,
        "the mean of two rows is half of APO-zero, and KTO where z0 is 0",
    ),
    Check(NCA(beta=0.1), 1.354662956, "DPO nca_pair", 1.354662956),
    Check(
        EXO(beta=0.1, epsilon=1e-3),
        2.539184819,
        "DPO exo_pair, label_smoothing 0.001",
        2.539184864,
        "TRL rounds log epsilon to float32; the authors' code has a target of its own instead of epsilon",
    ),
    Check(
        SPPO(beta=1e-3),
        249350.445,
        "DPO sppo_hard, beta 0.001",
        498700.89,
        "TRL leaves out the authors' factor 1/2",
    ),
    Check(
        DiscoPOP(beta=0.05, tau=0.05),
        0.8779809948,
        "DPO discopop, beta 0.05, tau 0.05",
        0.8779809948,
        "TRL gives NaN in float32 at large negative margins",
    ),
    Check(
        FDPO(beta=0.1, divergence=Divergence.forward_kl, alpha=None),
        0.6154695877,
        "DPO sigmoid, forward_kl",
        0.6154695877,
        "TRL gives NaN in float32 at large log-ratios",
    ),
    Check(
        FDPO(beta=0.1, divergence=Divergence.jensen_shannon, alpha=None),
        0.6589031761,
        "DPO sigmoid, js_divergence",
        0.6589031761,
    ),
    Check(
        FDPO(beta=0.1, divergence=Divergence.alpha, alpha=0.3),
        0.6270627169,
        "DPO sigmoid, alpha_divergence, coefficient 0.7",
        0.6270626783,
        "TRL's coefficient is 1 minus the paper's alpha; it stops with a KeyError in float64",
    ),
    Check(
        FDPO(beta=0.1, divergence=Divergence.alpha, alpha=0.5),
        0.6243846536,
        "DPO sigmoid, alpha_divergence, coefficient 0.5",
        0.6243846536,
        "the only alpha at which both count alike",
    ),
    Check(
        LNDPO(beta=5.0),
        0.2427990153,
        "DPO sigmoid_norm, beta 5",
        0.2427990153,
        "TRL logs beta times sums as rewards, about n times what it trains on",
    ),
    Check(RDPO(beta=0.1, alpha=0.03), 0.6587595555, remark="some code has the opposite sign, which rewards length"),
    Check(
        LDDPO(beta=0.1, alpha=0.5),
        0.6314278369,
        "DPO sigmoid, ld_alpha 0.5",
        0.6314278369,
        "before 0.29 TRL discounted the policy alone",
    ),
    Check(DPOP(beta=0.3, lam=50.0), 0.5170403967),
    Check(TDPO1(beta=0.1), 0.649159339),
    Check(TDPO2(beta=0.1, alpha=0.5), 0.6396589186, remark="the authors' command for it can run TDPO1"),
    Check(
        WPO(beta=0.01),
        0.6866683054,
        "DPO sigmoid, use_weighting, beta 0.01",
        1.266929277,
        "TRL has not limited the weight to 1 since 0.29: here it is 1.845",
    ),
    Check(AOT(beta=0.1, label_smoothing=0.0), 0.6302581947, "DPO aot", 0.6302581947, _MICRO_BATCH),
    Check(AOTUnpaired(beta=0.1, label_smoothing=0.0), 0.6302581947, "DPO aot_unpaired", 0.6302581947, _MICRO_BATCH),
    Check(ODPO(beta=0.5, alpha=1.0), 0.5783358492),
    Check(MallowsPO(beta=0.1, dispersion=0.29), 0.6801667117),
    Check(
        CalDPO(beta=1e-3),
        498701.131,
        remark="the paper; its authors' code halves the squares and gives 249350.686",
    ),
    Check(PlackettLuce(beta=0.1), 0.6302581947, remark="of two answers it is DPO"),
    Check(BestVsRest(beta=0.1), 0.6302581947, remark="of two answers it is DPO"),
    Check(
        BradleyTerry(centring=0.01, margin=0.0),
        0.6413897343,
        "Reward, center_rewards_coefficient 0.01",
        0.6413897343,
        "the sums of the log-probs stand for the rewards",
    ),
    Check(
        BradleyTerry(centring=0.01, margin=1.0),
        0.8757616875,
        "Reward, center_rewards_coefficient 0.01, margin 1.5",
        0.8757616875,
        "the gap of the scores is the margin",
    ),
    Check(
        Mixture(
            weights={"dpo": 0.8, "bco": 0.2, "nll": 1.0},
            settings={
                "dpo": DPO(beta=0.1, label_smoothing=0.0),
                "bco": BCO(beta=0.1, density_weights=False),
                "nll": NLL(**_SEQUENCES),
            },
        ),
        1.393676641,
        "DPO 0.8 sigmoid + 0.2 bco_pair + sft",
        1.393687879,
        "MPO; TRL's bco_pair has no delta",
    ),
)
