"""DPO that counts less of what the longer answer says beyond the length of the shorter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import within
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios
from alignment.types import RaggedLogps


def _beyond_the_shorter(pairs: RaggedLogps) -> Tensor:
    """(tokens,) bool: whether a token comes after as many tokens as the shorter completion of its pair has."""
    lengths = pairs.lengths
    shared = torch.minimum(lengths[0::2], lengths[1::2]).repeat_interleave(2)
    ends = (pairs.offsets[:-1] + shared).repeat_interleave(lengths)
    return torch.arange(len(pairs.values), device=ends.device) >= ends


@dataclass(kw_only=True)
class LDDPO(BetaPairLoss):
    """L = -log S(beta (u - v)), with u and v the *sums* of the per-token log-ratios log pi - log pi_ref over the first
    m = min(n_w, n_l) tokens of a completion plus alpha times the *sum* over the rest.

    n_w and n_l are the lengths of the chosen and the rejected completion, and S is the logistic function. Only the
    longer completion has a rest. alpha = 1 is DPO; alpha = 0 reads m tokens of both.

    Paper: Liu et al. 2024, arXiv:2409.06411.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: beta S(-beta (u - v)) for
    the first m tokens of either completion, alpha times that for the rest.

    Rewards: beta u and beta v, with the rest discounted.

    Recommended: beta 0.1; alpha 0.5 to start from; the paper chooses one for each model.

    Deviations: TRL's `ld_alpha` is the same since 0.29. Before, and in LLaMA-Factory, the policy's log-probs alone are
    discounted: then the margin at the start is not 0 but (1 - alpha) times what the reference gives to the rest.
    """

    name: ClassVar[str] = "ld_dpo"
    title: ClassVar[str] = "LD-DPO"
    purpose: ClassVar[str] = "against length: discounts tokens beyond the shorter answer"
    uncertain: ClassVar[str] = "whether the paper discounts the reference too; its alphas"
    needs_reference: ClassVar[bool] = True

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        within("loss.alpha", self.alpha, "[0, 1]")

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        ratios = log_ratios(inputs)
        weights = ratios.values.new_tensor([1.0, self.alpha])[_beyond_the_shorter(ratios).long()]
        rewards = self.beta * RaggedLogps(weights * ratios.values, ratios.offsets).sums()
        return LossOutput(-F.logsigmoid(rewards[0::2] - rewards[1::2]), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair, whatever alpha."""
        return per_pair(inputs.policy, math.log(2))
