"""SimPO with another shape of its reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative, require
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput

_MOST = 60.0
"""Largest exponent: beta times its exponential stays in float32."""


@dataclass(kw_only=True)
class AlphaPO(BetaPairLoss):
    """L = -log S(r_w - r_l - gamma), with r = beta (1 - e^(-alpha m)) / alpha and gamma = beta * gamma_beta_ratio.

    m is the *mean* log-prob per token of a completion under the policy; there is no reference. alpha = 0 is the limit r
    = beta m, SimPO.

    Paper: Gupta et al. 2025, arXiv:2501.03884.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = beta S(gamma - r_w +
    r_l) e^(-alpha m_w) / n_w, G_l the same with m_l and n_l.

    Rewards: r_w and r_l.

    Recommended: alpha 0.25, beta 2.5 and a ratio of 0.1 for Mistral-Instruct.

    Deviations: exponents above 60 are cut there. TRL's `alphapo` takes gamma and not its ratio to beta.
    """

    name: ClassVar[str] = "alphapo"
    title: ClassVar[str] = "AlphaPO"
    purpose: ClassVar[str] = "SimPO with another reward shape, to tune how hard it pushes"
    needs_reference: ClassVar[bool] = False

    gamma_beta_ratio: float
    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.gamma_beta_ratio", self.gamma_beta_ratio)
        require(math.isfinite(self.alpha), f"loss.alpha must be a finite number, not {self.alpha}.")

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards r_w and r_l (2 * pairs,)."""
        rewards = self.beta * self._shaped(inputs.policy.means())
        margins = rewards[0::2] - rewards[1::2] - self.beta * self.gamma_beta_ratio
        return LossOutput(-F.logsigmoid(margins), rewards.detach())

    def _shaped(self, means: Tensor) -> Tensor:
        """(1 - e^(-alpha m)) / alpha, accurate for a small alpha too."""
        if self.alpha == 0:
            return means
        return -torch.expm1((-self.alpha * means).clamp(max=_MOST)) / self.alpha

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """The same formula of the reference's own mean log-probs."""
        means = torch.stack([inputs.policy.sequence(i).double().mean() for i in range(len(inputs.policy))])
        shaped = means if self.alpha == 0 else (1 - torch.exp(-self.alpha * means)) / self.alpha
        excess = self.beta * (self.gamma_beta_ratio - shaped[0::2] + shaped[1::2])
        return torch.logaddexp(torch.zeros_like(excess), excess)
