"""DPO that stays unbiased under randomly swapped labels."""

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
class RobustDPO(BetaPairLoss):
    """L = [-(1 - e) log S(beta d) + e log S(-beta d)] / (1 - 2 e), with e the `flip_rate`.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, d = u - v, and S is the logistic function.

    Its expectation over labels that are swapped with probability e is DPO's loss for the true labels. Conservative DPO
    (`dpo` with `label_smoothing`) assumes the same noise and does something else: it pulls large margins back.

    Paper: Chowdhury, Kini and Natarajan 2024, arXiv:2403.00409.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = G_l = beta [(1 - e)
    S(-beta d) + e S(beta d)] / (1 - 2 e). It never falls below beta e / (1 - 2 e): the loss is not bounded below and
    may be negative.

    Rewards: beta u and beta v.

    Recommended: e 0.1 and beta 0.1 (the paper), or the rate of swapped labels where it is known.

    Deviations: none. TRL's `robust` takes e as `label_smoothing` and only warns where e >= 1/2, which has no meaning.
    """

    name: ClassVar[str] = "robust_dpo"
    title: ClassVar[str] = "Robust DPO"
    purpose: ClassVar[str] = "for pairs with a known share of swapped labels"
    needs_reference: ClassVar[bool] = True

    flip_rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        within("loss.flip_rate", self.flip_rate, "[0, 0.5)")

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        margins = rewards[0::2] - rewards[1::2]
        losses = -(1 - self.flip_rate) * F.logsigmoid(margins) + self.flip_rate * F.logsigmoid(-margins)
        return LossOutput(losses / (1 - 2 * self.flip_rate), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair and every flip rate."""
        return per_pair(inputs.policy, math.log(2))
