"""Noise contrastive alignment, for pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class NCA(BetaPairLoss):
    """L = -log S(beta u) - 1/2 log S(-beta u) - 1/2 log S(-beta v).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, and S is the logistic function.

    The rewards are trained by themselves and not as a difference, so that the likelihood of the chosen completion is
    anchored.

    Paper: Chen et al. 2024, arXiv:2402.05369, the form for pairs.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = beta (S(-beta u) -
    1/2 S(beta u)), zero at beta u = log 2 and negative beyond; G_l = 1/2 beta S(beta v).

    Rewards: beta u and beta v.

    Recommended: beta 0.01 (the authors' 7B runs, learning rate 5e-6).

    Deviations: none. TRL's `nca_pair` is the same.
    """

    name: ClassVar[str] = "nca"
    title: ClassVar[str] = "NCA"
    purpose: ClassVar[str] = "DPO that keeps up the likelihood of the chosen answer"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        chosen, rejected = rewards[0::2], rewards[1::2]
        losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """2 log 2 for every pair."""
        return per_pair(inputs.policy, 2 * math.log(2))
