"""DPO that trusts a pair by how likely the policy itself would write it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput
from alignment.losses.dpo import log_ratios
from alignment.types import Quantity, RaggedLogps


@dataclass(kw_only=True)
class WPO(BetaPairLoss):
    """L = -sg(min(1, w_w w_l)) log S(beta (u - v)), with w = exp(*mean* over tokens of log pi(y_t) - c_t).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, S is the logistic function and sg stops the gradient. c_t = log sum_v pi(v)^2, over the vocabulary, is
    what log pi comes to for a token that the policy draws itself (the logarithm of its expected probability): where
    the policy would write a completion itself, w is near 1.

    Paper: Zhou et al. 2024, arXiv:2406.11827.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = G_l = min(1, w_w w_l) beta S(-beta (u - v)).

    Rewards: beta u and beta v. Parts: `weight` is min(1, w_w w_l).

    Recommended: beta 0.01 (the authors' configurations).

    Deviations: none from the authors' code, which has the limit of 1. TRL has not had it since 0.29: there a pair that
    the policy would write more readily than its own samples counts more than once.
    """

    name: ClassVar[str] = "wpo"
    title: ClassVar[str] = "WPO"
    purpose: ClassVar[str] = "for off-policy pairs: unlikely pairs count less"
    uncertain: ClassVar[str] = "whether the paper has the limit of 1 on the weight, as its authors' code does"
    needs_reference: ClassVar[bool] = True
    quantities: ClassVar[frozenset[Quantity]] = frozenset({Quantity.collision})

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,); part `weight` (pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        above = inputs.policy.values.detach() - inputs.quantities[Quantity.collision].values.detach()
        log_weights = RaggedLogps(above, inputs.policy.offsets).means()
        weights = torch.exp((log_weights[0::2] + log_weights[1::2]).clamp(max=0))
        losses = -weights * F.logsigmoid(rewards[0::2] - rewards[1::2])
        return LossOutput(losses, rewards.detach(), {"weight": weights})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """min(1, w_w w_l) log 2: the weight is that of the policy's own distributions."""
        collisions = inputs.quantities[Quantity.collision]
        weights = torch.stack([
            torch.exp((inputs.policy.sequence(i) - collisions.sequence(i)).double().mean())
            for i in range(len(inputs.policy))
        ])  # fmt: skip
        return math.log(2) * (weights[0::2] * weights[1::2]).clamp(max=1)
