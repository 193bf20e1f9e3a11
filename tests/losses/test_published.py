"""One pair whose losses were worked out elsewhere, to ten digits."""

from dataclasses import replace

import pytest
import torch

from alignment.losses import (
    CPO,
    DPO,
    DPOP,
    EXO,
    FDPO,
    GPO,
    IPO,
    LDDPO,
    LNDPO,
    NCA,
    ODPO,
    ORPO,
    RDPO,
    RPO,
    SPPO,
    TPO,
    AlphaPO,
    APODown,
    APOZero,
    BCOPair,
    CalDPO,
    CPOSimPO,
    DiscoPOP,
    Hinge,
    MallowsPO,
    Quantity,
    RobustDPO,
    SimPO,
    SLiCHF,
)
from alignment.losses.f_dpo import Divergence
from alignment.losses.gpo import Shape
from alignment.losses.ipo import Reduction
from alignment.losses.nll import NLLReduction
from alignment.ragged import RaggedLogps
from tests.losses.examples import SEQUENCES, TOKENS


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (DPO(beta=0.1, label_smoothing=0.0), 0.6302581947),
        (DPO(beta=0.1, label_smoothing=0.1), 0.6432581947),
        (IPO(tau=0.1, reduction=Reduction.sum), 13.69),
        (IPO(tau=0.1, reduction=Reduction.mean), 22.48340278),
        (SimPO(beta=2.0, gamma_beta_ratio=0.5), 1.026758839),
        (ORPO(lam=0.1, **SEQUENCES), 0.676125384),
        (RobustDPO(beta=0.1, flip_rate=0.1), 0.6140081947),
        (Hinge(beta=0.1), 0.87),
        (Hinge(beta=1.0), 0.0),
        (SLiCHF(delta=1.0, lam=0.1), 0.25),
        (AlphaPO(beta=2.5, gamma_beta_ratio=0.04, alpha=0.25), 0.4646924416),
        (EXO(beta=0.1, epsilon=1e-3), 2.539184819),
        (NCA(beta=0.1), 1.354662956),
        (SPPO(beta=1e-3), 249350.445),
        (APOZero(beta=0.1), 0.9675132634),
        (APODown(beta=0.1), 0.9800430901),
        (DiscoPOP(beta=0.05, tau=0.05), 0.8779809948),
        (BCOPair(beta=0.1), 1.322406615),
        (FDPO(beta=0.1, divergence=Divergence.forward_kl, alpha=None), 0.6154695877),
        (FDPO(beta=0.1, divergence=Divergence.jensen_shannon, alpha=None), 0.6589031761),
        (FDPO(beta=0.1, divergence=Divergence.alpha, alpha=0.5), 0.6243846536),
        (FDPO(beta=0.1, divergence=Divergence.alpha, alpha=0.3), 0.6270627169),
        (RDPO(beta=0.1, alpha=0.03), 0.6587595555),
        (LNDPO(beta=5.0), 0.2427990153),
        (DPOP(beta=0.3, lam=50.0), 0.5170403967),
        (CalDPO(beta=1e-3), 498701.131),
        (GPO(beta=2.0, shape=Shape.squared), 2.56),
        (GPO(beta=2.0, shape=Shape.exponential), 0.07427357821),
        (GPO(beta=2.0, shape=Shape.truncated_quadratic), 0.0),
        (GPO(beta=2.0, shape=Shape.savage), 0.004780121168),
        (LDDPO(beta=0.1, alpha=0.5), 0.6314278369),
        (CPO(beta=0.1, lam=0.0, label_smoothing=0.0, **TOKENS), 0.5759394199),
        (CPO(beta=0.1, lam=1.0, label_smoothing=0.0, **TOKENS), 1.20093942),
        (
            CPO(beta=0.1, lam=1.0, label_smoothing=0.0, **TOKENS | {"nll_reduction": NLLReduction.sequence_sum}),
            3.07593942,
        ),
        (CPOSimPO(beta=10.0, gamma_beta_ratio=0.54, alpha=0.05, **TOKENS), 3.383547813),
        (RPO(beta=0.1, alpha=1.0, **SEQUENCES), 1.255258195),
        (ODPO(beta=0.5, alpha=1.0), 0.5783358492),
        (MallowsPO(beta=0.1, dispersion=0.29), 0.6801667117),
        (TPO(beta=0.01, alpha=1.0, **TOKENS), 1.930725304),
    ],
)
def test_published_pair(inputs, ragged, loss, value):
    """One pair with a = -2.5, A = -3, b = -5, B = -4.2 over 4 and 6 tokens: u = 0.5, v = -0.8, d = 1.3.

    DPO: log(1 + e^-0.13) = 0.630258; smoothed: + 0.1 * 0.13. IPO: (1.3 - 5)^2, and
    (0.125 + 0.8 / 6 - 5)^2. SimPO: log(1 + e^(1 - 2 (-0.625 + 5 / 6))).
    ORPO: p = e^-0.625 and e^(-5/6), w = 0.404395, 0.625 + 0.1 log(1 + e^-w).
    The scores are 4.5 and 3, the entropies 1/2; before a triple's chosen completion stands a gold one of 1.25 nats.
    """
    pair = inputs(
        [[-0.5, -1.0, -0.25, -0.75], [-1.0, -0.5, -1.5, -0.25, -0.75, -1.0]],
        [[-0.75, -1.25, -0.5, -0.5], [-0.5, -0.5, -1.0, -0.5, -0.75, -0.95]],
        scores=torch.tensor([4.5, 3.0], dtype=torch.float64),
        quantities={Quantity.entropy: ragged([[0.5] * 4, [0.5] * 6])},
    )
    if loss.requirements().unit == "list":
        gold = RaggedLogps.from_sequences([torch.tensor([-1.25]).double(), *map(pair.policy.sequence, range(2))])
        pair = replace(pair, policy=gold, sizes=torch.tensor([3]))
    assert loss(pair).losses.item() == pytest.approx(value, rel=2e-9)  # the values have ten digits
