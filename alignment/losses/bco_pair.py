"""Binary classifier optimisation of pairs, without its running reward shift."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class BCOPair(BetaPairLoss):
    """L = -log S(beta u) - log S(-beta v).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, and S is the logistic function.

    It is BCO with the reward shift delta fixed at 0: a classifier of the chosen against the rejected completions whose
    logits are the rewards.

    Paper: Jung et al. 2024, arXiv:2404.04656.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = beta S(-beta u), G_l
    = beta S(beta v).

    Rewards: beta u and beta v.

    Recommended: beta 0.01 (TRL's recipe), 0.1 (the paper).

    Deviations: the paper's own objective subtracts a running mean of all rewards, which a function of one step does not
    have. TRL's `bco_pair` is the same as ours.
    """

    name: ClassVar[str] = "bco_pair"
    title: ClassVar[str] = "BCO-pair"
    purpose: ClassVar[str] = "a classifier of chosen and rejected, without a running mean"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        losses = -F.logsigmoid(rewards[0::2]) - F.logsigmoid(-rewards[1::2])
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """2 log 2 for every pair."""
        return per_pair(inputs.policy, 2 * math.log(2))
