"""DPO-Positive: the chosen answer may not become less likely than it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class DPOP(BetaPairLoss):
    """L = -log S(beta (d - lam max(0, -u))).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, d = u - v, and S is the logistic function.

    Plain DPO can be lowered by making both completions less likely, the rejected one more so. Here a chosen completion
    that falls below the reference costs `lam` times its fall.

    Paper: Pal et al. 2024, arXiv:2402.13228.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l, with z the argument of S:
    G_w = beta S(-z) (1 + lam) where u < 0 and beta S(-z) elsewhere, G_l = beta S(-z).

    Rewards: beta (u - lam max(0, -u)) and beta v.

    Recommended: beta 0.3, lam 50 (the paper).

    Deviations: none; TRL does not have this loss.
    """

    name: ClassVar[str] = "dpop"
    title: ClassVar[str] = "DPOP"
    purpose: ClassVar[str] = "DPO that keeps the chosen answer likely; for similar answers"
    needs_reference: ClassVar[bool] = True

    lam: float

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.lam", self.lam)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards (2 * pairs,)."""
        ratios = log_ratios(inputs).sums()
        chosen = self.beta * (ratios[0::2] - self.lam * F.relu(-ratios[0::2]))
        rejected = self.beta * ratios[1::2]
        rewards = torch.stack([chosen, rejected], dim=1).flatten()
        return LossOutput(-F.logsigmoid(chosen - rejected), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair."""
        return per_pair(inputs.policy, math.log(2))
