"""The loss that a language model discovered: logistic and exponential, blended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import within
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class DiscoPOP(BetaPairLoss):
    """L = (1 - m) log(1 + e^-z) + m e^-z, with z = beta d and the blend m = S(z / tau).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, d = u - v, and S is the logistic function.

    Paper: Lu et al. 2024, arXiv:2406.08414, Eq. 5. It is not convex near z = 0.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l, with m' = m (1 - m) / tau:
    G_w = G_l = beta [(1 - m) S(-z) + m e^-z + m' (log(1 + e^-z) - e^-z)].

    At d = 0 that is beta (3/4 - (1 - log 2) / (4 tau)), negative below tau = 0.102. With the recommended tau a policy
    near the reference, beta d between -0.12 and 0.07, is pushed the wrong way: the paper reports the local minimum at
    d = -2.37 for its beta.

    Rewards: beta u and beta v.

    Recommended: beta 0.05, tau 0.05 (the authors' code).

    Deviations: m e^-z is formed as one exponential, exp(-z + log m), so that no large negative margin gives 0 times
    infinity, as it does in TRL's `discopop` in float32. With tau > 1 it would grow without bound: such a tau is
    refused.
    """

    name: ClassVar[str] = "discopop"
    title: ClassVar[str] = "DiscoPOP"
    purpose: ClassVar[str] = "a logistic and exponential blend that a language model found"
    needs_reference: ClassVar[bool] = True

    tau: float

    def __post_init__(self) -> None:
        super().__post_init__()
        within("loss.tau", self.tau, "(0, 1)")

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        z = rewards[0::2] - rewards[1::2]
        losses = torch.sigmoid(-z / self.tau) * F.softplus(-z) + torch.exp(F.logsigmoid(z / self.tau) - z)
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """(log 2 + 1) / 2 for every pair."""
        return per_pair(inputs.policy, 0.5 * math.log(2) + 0.5)
