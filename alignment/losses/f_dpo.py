"""DPO with another divergence from the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import require
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


class Divergence(Enum):
    """What keeps the policy near the reference. Reverse KL is plain DPO."""

    forward_kl = "forward_kl"
    jensen_shannon = "jensen_shannon"
    alpha = "alpha"


_MOST = 60.0
"""Largest exponent: its exponential and its square of a sum stay in float32."""


@dataclass(kw_only=True)
class FDPO(BetaPairLoss):
    """L = -log S(beta g(u) - beta g(v)), with g(u) = f'(e^u) for the divergence f.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, and S is the logistic function. g is, up to a constant that cancels: forward_kl -e^-u, jensen_shannon
    log S(u), alpha (1 - e^(-a u)) / a with a = `alpha` in (0, 1), the paper's alpha; towards a = 0 it is DPO, towards 1
    forward KL. `alpha` is null with the other two.

    Paper: Wang et al. 2023, arXiv:2309.16240.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = beta S(-m) g'(u),
    G_l = beta S(-m) g'(v), with m the difference of the rewards and g' = e^-u, S(-u), e^(-a u).

    Rewards: beta g(u) and beta g(v).

    Recommended: beta 0.1; the paper compares forward KL, Jensen-Shannon and alpha 0.3, 0.5, 0.7.

    Deviations: exponents above 60 are cut there, where the gradient of their own sequence becomes 0. TRL's `alpha` is 1
    minus the paper's, it clamps at the limit of float32 and knows no float64, its forward KL gives NaN at large
    negative ratios, and it logs beta u and beta v.
    """

    name: ClassVar[str] = "f_dpo"
    title: ClassVar[str] = "f-DPO"
    purpose: ClassVar[str] = "DPO with another divergence, for more or less diverse answers"
    needs_reference: ClassVar[bool] = True

    divergence: Divergence
    alpha: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence is Divergence.alpha:
            given = self.alpha is not None and 0 < self.alpha < 1
            require(given, f"loss.alpha must be in (0, 1) with loss.divergence alpha, not {self.alpha}.")
        else:
            require(
                self.alpha is None,
                f"loss.alpha must be null with loss.divergence {self.divergence.value}, not {self.alpha}.",
            )

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta g(u) and beta g(v) (2 * pairs,)."""
        ratios = log_ratios(inputs).sums()
        if self.divergence is Divergence.jensen_shannon:
            slopes = F.logsigmoid(ratios)
        elif self.divergence is Divergence.forward_kl:
            slopes = -torch.exp((-ratios).clamp(max=_MOST))
        else:
            assert self.alpha is not None, "refused above"
            slopes = -torch.expm1((-self.alpha * ratios).clamp(max=_MOST)) / self.alpha
        rewards = self.beta * slopes
        return LossOutput(-F.logsigmoid(rewards[0::2] - rewards[1::2]), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair and every divergence."""
        return per_pair(inputs.policy, math.log(2))
