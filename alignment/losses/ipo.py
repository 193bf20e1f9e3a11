"""Identity preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from torch import Tensor

from alignment.errors import positive
from alignment.losses.base import Loss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


class Reduction(Enum):
    """How a sequence's per-token log-ratios become one number."""

    mean = "mean"
    sum = "sum"


@dataclass(kw_only=True)
class IPO(Loss):
    """L = (h - 1 / (2 tau))^2, with h = r_w - r_l.

    r is the log-ratio log pi(y|x) - log pi_ref(y|x) of a completion: its *mean* over the completion's n tokens with
    `reduction` mean, its *sum* with `reduction` sum. tau means something else in the two: the target margin 1 / (2 tau)
    is per token in the first and per sequence in the second.

    Paper: Azar et al. 2023, arXiv:2310.12036, Eq. 17, which is written with sums.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G = 2 (1 / (2 tau) - h), divided for `mean` by the n of its own completion. It turns negative beyond the target.

    Rewards: r_w and r_l, the mean or the sum that is optimised, without a factor.

    Recommended: tau 0.1; a search over 0.01, 0.1, 0.5 and 1 is usual.

    Deviations: TRL's `ipo` has means (its `beta` is tau here), on the word of the paper's authors that their results
    had used them; the DPO authors' implementation of IPO has sums. TRL logs beta times the *summed* log-ratio as
    reward, whose margin can disagree in sign with the one that the loss optimises.
    """

    name: ClassVar[str] = "ipo"
    title: ClassVar[str] = "IPO"
    purpose: ClassVar[str] = "aims at a fixed margin, so clear preferences do not overfit"
    unit: ClassVar[str] = "pair"
    needs_reference: ClassVar[bool] = True

    tau: float
    reduction: Reduction

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.tau", self.tau)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards r_w and r_l (2 * pairs,)."""
        ratios = log_ratios(inputs)
        rewards = ratios.means() if self.reduction is Reduction.mean else ratios.sums()
        losses = (rewards[0::2] - rewards[1::2] - 1 / (2 * self.tau)) ** 2
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """1 / (4 tau^2) for every pair, with either reduction."""
        return per_pair(inputs.policy, 0.25 / self.tau**2)
