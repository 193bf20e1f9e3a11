"""Convex losses of the DPO margin: the hinge, and the family that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios

_STEEPEST = -30.0
"""Margin from which on the exponential is continued by its tangent."""


@dataclass(kw_only=True)
class Hinge(BetaPairLoss):
    """L = max(0, 1 - beta d).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, and d = u - v.

    Papers: Liu et al. 2023 (RSO), arXiv:2309.06657, "hinge-norm". SLiC-HF's own hinge is another loss, without a
    reference: `slic_hf`.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = G_l = beta where
    beta d < 1, and 0 beyond.

    Rewards: beta u and beta v.

    Recommended: beta 0.05 (the paper's gamma).

    Deviations: none. TRL's `hinge` is the same.
    """

    name: ClassVar[str] = "hinge"
    title: ClassVar[str] = "Hinge"
    purpose: ClassVar[str] = "DPO that stops at a margin of 1"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        margins = rewards[0::2] - rewards[1::2]
        return LossOutput(F.relu(1 - margins), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """1 for every pair."""
        return per_pair(inputs.policy, 1.0)


class Shape(Enum):
    """A decreasing function f of the margin x = beta d."""

    squared = "squared"
    exponential = "exponential"
    truncated_quadratic = "truncated_quadratic"
    savage = "savage"


@dataclass(kw_only=True)
class GPO(BetaPairLoss):
    """L = f(beta d), with f by `shape`: squared (1 - x)^2, exponential e^-x, truncated_quadratic max(0, 1 - x)^2,
    savage 1 / (1 + e^x)^2, the only one that is not convex.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, d = u - v, and S is the logistic function.

    The family has more members under names of their own: log(1 + e^-x) is `dpo`, max(0, 1 - x) is `hinge`, and squared
    is `ipo` with sums, beta = 2 tau, up to the factor beta^2.

    Paper: Tang et al. 2024, arXiv:2402.05749.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = G_l = -beta f'(beta
    d), that is beta times 2 (1 - x), e^-x, 2 max(0, 1 - x), 2 S(-x)^2 S(x).

    Rewards: beta u and beta v.

    Recommended: the paper compares the shapes at equal strength of regularisation and finds no winner; beta 0.1.

    Deviations: e^-x goes on as a straight line below x = -30, where its value is 1e13: no number of float32 overflows.
    """

    name: ClassVar[str] = "gpo"
    title: ClassVar[str] = "GPO"
    purpose: ClassVar[str] = "DPO with another function of the margin, to compare their pull"
    needs_reference: ClassVar[bool] = True

    shape: Shape

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        x = rewards[0::2] - rewards[1::2]
        if self.shape is Shape.squared:
            losses = (1 - x) ** 2
        elif self.shape is Shape.exponential:
            bounded = x.clamp(min=_STEEPEST)
            losses = torch.exp(-bounded) * (1 + bounded - x)
        elif self.shape is Shape.truncated_quadratic:
            losses = F.relu(1 - x) ** 2
        else:
            losses = torch.sigmoid(-x) ** 2
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """1 for every pair, and 1/4 for savage."""
        return per_pair(inputs.policy, 0.25 if self.shape is Shape.savage else 1.0)
