"""Efficient exact optimisation, for pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.errors import within
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class EXO(BetaPairLoss):
    """L = q log(q / (1 - e)) + (1 - q) log((1 - q) / e), with q = S(beta d) and e the `epsilon`.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, d = u - v, and S is the logistic function.

    It is the reverse KL divergence from the policy's preference q to labels that say 1 - e; DPO is the forward one.

    Paper: Ji et al. 2024, arXiv:2402.00856, Eq. 16.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = G_l = beta q (1 - q)
    (log((1 - e) / e) - beta d). It vanishes where q does: a pair that is ranked badly wrong is given up.

    Rewards: beta u and beta v.

    Recommended: epsilon 1e-3; beta 0.5 on HH and TL;DR, 0.1 on IMDB (the paper).

    Deviations: the authors' code has the targets 0 and -10 in place of log(1 - e) and log(e). TRL's `exo_pair` is the
    same as ours and takes e as `label_smoothing`; its default of 0 is refused there as here.
    """

    name: ClassVar[str] = "exo"
    title: ClassVar[str] = "EXO"
    purpose: ClassVar[str] = "close to the best policy by reverse KL; spares misranked pairs"
    needs_reference: ClassVar[bool] = True

    epsilon: float

    def __post_init__(self) -> None:
        super().__post_init__()
        within("loss.epsilon", self.epsilon, "(0, 0.5)")

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        margins = rewards[0::2] - rewards[1::2]
        log_q, log_not_q = F.logsigmoid(margins), F.logsigmoid(-margins)
        agree = log_q.exp() * (log_q - math.log1p(-self.epsilon))
        losses = agree + log_not_q.exp() * (log_not_q - math.log(self.epsilon))
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """-log 2 - (log(1 - e) + log e) / 2 for every pair."""
        return per_pair(inputs.policy, -math.log(2) - 0.5 * math.log1p(-self.epsilon) - 0.5 * math.log(self.epsilon))
