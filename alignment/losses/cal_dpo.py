"""DPO whose log-ratios are calibrated to the reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class CalDPO(BetaPairLoss):
    """L = -log S(d) + (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, d = u - v, and S is the logistic function.

    The squares hold the log-ratios at the targets +-1 / (2 beta); the logistic term has no beta.

    Paper: Xiao et al. 2024, arXiv:2412.14516.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = S(-d) + 1 / beta - 2
    u, G_l = S(-d) + 1 / beta + 2 v.

    Rewards: u and v.

    Recommended: beta 1e-3, learning rate 5e-7 (the authors' code). The loss is then of the order of 1e5.

    Deviations: the authors' code has half of each square. TRL does not have this loss.
    """

    name: ClassVar[str] = "cal_dpo"
    title: ClassVar[str] = "Cal-DPO"
    purpose: ClassVar[str] = "DPO with log-ratios drawn to the scale of true rewards"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards u and v (2 * pairs,)."""
        ratios = log_ratios(inputs).sums()
        u, v, target = ratios[0::2], ratios[1::2], 1 / (2 * self.beta)
        return LossOutput(-F.logsigmoid(u - v) + (u - target) ** 2 + (v + target) ** 2, ratios.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log 2 + 1 / (2 beta^2) for every pair."""
        return per_pair(inputs.policy, math.log(2) + 0.5 / self.beta**2)
