"""Token-level DPO: the margin counts how far the policy has moved at every token, over the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import positive
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios
from alignment.types import Quantity


@dataclass(kw_only=True)
class TDPO1(BetaPairLoss):
    """L = -log S(beta (u - v - (D_l - D_w))).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens. D_w and D_l are the *sums* over the same positions of KL(pi_ref || pi), the divergence of the two
    next-token distributions over the whole vocabulary; both carry a gradient. S is the logistic function.

    At every position the KL is minus the reference's own mean of the log-ratio: log-ratio plus KL is how much better a
    token is than what the reference would have said there, and u + D sums this advantage over a completion.

    Paper: Zeng et al. 2024, arXiv:2404.11999.

    Gradient of -L, with z the argument of S: per chosen token G_w and, with the opposite sign, per rejected token G_l,
    G_w = G_l = beta S(-z). With respect to the divergences -dL/dD_w = beta S(-z) and -dL/dD_l = -beta S(-z): the policy
    is driven away from the reference along the chosen and towards it along the rejected completion.

    Rewards: beta (u + D_w) and beta (v + D_l). Parts: `divergence_chosen` is D_w, `divergence_rejected` is D_l.

    Recommended: beta 0.1 (the authors' configuration).

    Deviations: none from the authors' code. TRL does not have this loss.
    """

    name: ClassVar[str] = "tdpo1"
    title: ClassVar[str] = "TDPO1"
    purpose: ClassVar[str] = "adds a KL of next-token distributions; needs a live reference"
    needs_reference: ClassVar[bool] = True
    quantities: ClassVar[frozenset[Quantity]] = frozenset({Quantity.divergence})

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta (u + D_w) and beta (v + D_l) (2 * pairs,); parts: D_w and D_l (pairs,)."""
        divergences = inputs.quantities[Quantity.divergence].sums()
        rewards = self.beta * (log_ratios(inputs).sums() + divergences)
        losses = -F.logsigmoid(rewards[0::2] - rewards[1::2])
        return LossOutput(losses, rewards.detach(), _parts(divergences))

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair: the divergences are 0 too."""
        return per_pair(inputs.policy, math.log(2))


@dataclass(kw_only=True)
class TDPO2(BetaPairLoss):
    """L = -log S(beta (u - v - alpha (D_l - sg(D_w)))).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens. D_w and D_l are the *sums* over the same positions of KL(pi_ref || pi), the divergence of the two
    next-token distributions over the whole vocabulary; sg stops the gradient. S is the logistic function.

    `tdpo1` would also drive the policy away from the reference along the chosen completion. Here it is only held near
    along the rejected one.

    Paper: Zeng et al. 2024, arXiv:2404.11999.

    Gradient of -L, with z the argument of S: per chosen token G_w and, with the opposite sign, per rejected token G_l,
    G_w = G_l = beta S(-z). With respect to the divergences -dL/dD_l = -alpha beta S(-z), and D_w has none.

    Rewards: beta (u + alpha D_w) and beta (v + alpha D_l). Parts: `divergence_chosen` is D_w, `divergence_rejected` is
    D_l.

    Recommended: beta 0.1, alpha 0.5 (the authors' configuration).

    Deviations: the authors' code logs beta (u + D) as rewards, whose margin is not the one optimised unless alpha is 1.
    Its configuration says `if_tdpo2: false` in some versions, with which the command for TDPO2 runs TDPO1. TRL does
    not have this loss.
    """

    name: ClassVar[str] = "tdpo2"
    title: ClassVar[str] = "TDPO2"
    purpose: ClassVar[str] = "TDPO1 that does not push chosen answers off the reference"
    needs_reference: ClassVar[bool] = True
    quantities: ClassVar[frozenset[Quantity]] = frozenset({Quantity.divergence})

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.alpha", self.alpha)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta (u + alpha D) (2 * pairs,); parts: D_w and D_l (pairs,)."""
        divergences = inputs.quantities[Quantity.divergence].sums()
        held = torch.stack([divergences[0::2].detach(), divergences[1::2]], dim=1).flatten()
        rewards = self.beta * (log_ratios(inputs).sums() + self.alpha * held)
        losses = -F.logsigmoid(rewards[0::2] - rewards[1::2])
        return LossOutput(losses, rewards.detach(), _parts(divergences))

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair: the divergences are 0 too."""
        return per_pair(inputs.policy, math.log(2))


def _parts(divergences: Tensor) -> dict[str, Tensor]:
    divergences = divergences.detach()
    return {"divergence_chosen": divergences[0::2], "divergence_rejected": divergences[1::2]}
