"""Self-play preference optimisation, with the winner taken for certain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class SPPO(BetaPairLoss):
    """L = (u - 1 / (2 beta))^2 / 2 + (v + 1 / (2 beta))^2 / 2.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens.

    beta is the inverse of the paper's eta. The target 1 / (2 beta) is its (P - 1/2) / beta with a win rate P of 1.

    Paper: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with hard labels.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = 1 / (2 beta) - u,
    G_l = v + 1 / (2 beta).

    Rewards: beta u and beta v.

    Recommended: beta 1e-3, learning rate 5e-7 with RMSprop (the authors). The loss is then of the order of 1e5 and its
    gradient of 500: with the usual clipping of the gradient's norm every step is clipped.

    Deviations: none from the authors' code, which has the halves. TRL's `sppo_hard` has not, so it is twice this loss.
    """

    name: ClassVar[str] = "sppo"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        ratios = log_ratios(inputs).sums()
        target = 1 / (2 * self.beta)
        losses = (ratios[0::2] - target) ** 2 / 2 + (ratios[1::2] + target) ** 2 / 2
        return LossOutput(losses, self.beta * ratios.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """1 / (4 beta^2) for every pair."""
        return per_pair(inputs.policy, 0.25 / self.beta**2)
