"""DPO that trusts a preference more where the reference is sure of what to say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.errors import positive
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios
from alignment.types import Quantity

_LEAST = 1e-6
"""Smallest entropy whose logarithm is taken: a completion of which every token is certain still has a finite weight."""


@dataclass(kw_only=True)
class MallowsPO(BetaPairLoss):
    """L = -log S(beta phi (u - v)), with phi = -c log((h_w + h_l) / 2).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, and S is the logistic function. h is the *mean* over a completion's tokens of the entropy of the
    reference's next-token distribution, over the logarithm of the vocabulary's size: between 0 and 1. phi stands for
    the dispersion of human preferences, constant for a pair: 0 where the reference is at a loss, large where it is
    certain. c is `dispersion`.

    Paper: Chen et al. 2024, arXiv:2405.14953; this is its MallowsPO-theta on top of DPO.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = G_l = beta phi S(-beta phi (u - v)).

    Rewards: beta phi u and beta phi v. Parts: `phi`.

    Recommended: c 0.29, the default of the authors' code; beta 0.1. c and beta are one factor: c is what brings phi
    near 1 on average, so that beta keeps its meaning.

    Deviations: an entropy below 1e-6 counts as 1e-6. The authors' code logs beta u and beta v as rewards; as published
    it is set up on top of SimPO, with means and without the reference in the margin. TRL has no such loss.
    """

    name: ClassVar[str] = "mallows_po"
    title: ClassVar[str] = "MallowsPO"
    purpose: ClassVar[str] = "weights prompts by how sure the reference is of its answer"
    uncertain: ClassVar[str] = "how the paper averages h; here as in the authors' code"
    needs_reference: ClassVar[bool] = True
    quantities: ClassVar[frozenset[Quantity]] = frozenset({Quantity.entropy})

    dispersion: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.dispersion", self.dispersion)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta phi u and beta phi v (2 * pairs,); part `phi` (pairs,)."""
        entropies = inputs.quantities[Quantity.entropy].means()
        phi = -self.dispersion * ((entropies[0::2] + entropies[1::2]) / 2).clamp(_LEAST, 1.0).log()
        rewards = self.beta * phi.repeat_interleave(2) * log_ratios(inputs).sums()
        return LossOutput(-F.logsigmoid(rewards[0::2] - rewards[1::2]), rewards.detach(), {"phi": phi})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair."""
        return per_pair(inputs.policy, math.log(2))
