"""Listwise preference optimisation with lambda weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.errors import positive
from alignment.losses.base import LossInputs, LossOutput
from alignment.losses.lists import BetaListLoss, better_pairs, lowest, members, scores_of, sizes_of, table

_MOST = 64.0
"""Largest psi: its gain of 1.8e19, times any difference of rewards, stays in float32."""


@dataclass(kw_only=True)
class LiPO(BetaListLoss):
    """L = -sum_{psi_i > psi_j} w_ij log S(r_i - r_j), with w_ij = |2^psi_i - 2^psi_j| |1 / log(1 + n_i) - 1 / log(1 +
    n_j)|.

    r = beta u, with u the log-ratio log pi(y|x) - log pi_ref(y|x) of a completion, *summed* over its tokens; S is the
    logistic function. psi = score / `scale` is what the data say of a completion, n its rank (from 1) in its list by
    the policy's current rewards r: a pair weighs what swapping its ranks would change in the discounted cumulative gain
    of that ranking. The weights carry no gradient. A *sum* over the pairs of a list.

    Paper: Liu et al. 2024, arXiv:2402.01878, LiPO-lambda, with gain 2^psi - 1 and discount log(1 + n).

    Gradient of -L per token of completion i: G_i = beta (sum over worse j of w_ij S(r_j - r_i) - sum over better j of
    w_ij S(r_i - r_j)), between changes of the ranks.

    Rewards: r.

    Recommended: beta 0.1. The paper's psi lie in 0 to 1: let `scale` be the top of the scores' scale, for scores of 1
    to 10 it is 10; with scores as they are a gain would be 1023.

    Deviations: psi above 64 counts as 64. Equal rewards, as all are before the first update, rank in the order of the
    list. TRL has none.
    """

    name: ClassVar[str] = "lipo"
    title: ClassVar[str] = "LiPO"
    purpose: ClassVar[str] = "for scored lists: pairs count by their effect on the ranking"
    uncertain: ClassVar[str] = (
        "gain and discount were read in an account of the paper; natural logarithm as in the authors' ranking library"
    )
    needs_scores: ClassVar[bool] = True
    discontinuous_at_reference: ClassVar[bool] = True

    scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.scale", self.scale)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (lists,), rewards beta u (S,)."""
        sizes = sizes_of(inputs)
        rewards = self.rewards(inputs)
        by_list = table(rewards, sizes)
        ranked = by_list.detach().masked_fill(~members(sizes), lowest(rewards.dtype))
        ranks = ranked.argsort(dim=1, descending=True, stable=True).argsort(1) + 1
        losses = -F.logsigmoid(by_list[:, :, None] - by_list[:, None]) * self._weights(inputs, ranks).to(rewards.dtype)
        return LossOutput(losses.sum((1, 2)), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 times the sum of the weights, with the order of the list for the ranks."""
        sizes = sizes_of(inputs)
        ranks = members(sizes).cumsum(1)
        return math.log(2) * self._weights(inputs, ranks).sum((1, 2))

    def _weights(self, inputs: LossInputs, ranks: Tensor) -> Tensor:
        """(lists, longest list, longest list) float64, 0 for what is no pair."""
        gains = (scores_of(inputs) / self.scale).clamp(max=_MOST).exp2()
        discounts = 1 / ranks.double().log1p()
        gained = (gains[:, :, None] - gains[:, None]).abs() * (discounts[:, :, None] - discounts[:, None]).abs()
        return gained * better_pairs(sizes_of(inputs), inputs.scores)
