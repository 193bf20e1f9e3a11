"""SimPO's margin under a ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative
from alignment.losses.base import Loss, LossInputs, LossOutput


@dataclass(kw_only=True)
class RePO(Loss):
    """L = max(0, gamma - (m_w - m_l)).

    m is the *mean* log-prob per token of a completion under the policy; there is no reference. A pair whose margin is
    gamma or more is left alone. There is no beta: it would only scale the learning rate.

    Paper: Wu et al. 2025, arXiv:2503.07426.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = 1 / n_w and G_l = 1
    / n_l where m_w - m_l < gamma, 0 elsewhere.

    Rewards: m_w and m_l.

    Recommended: gamma 0.5, between 0.2 and 0.8.

    Deviations: none; TRL does not have this loss.
    """

    name: ClassVar[str] = "repo"
    title: ClassVar[str] = "RePO"
    purpose: ClassVar[str] = "SimPO without beta: a hinge on the margin per token"
    uncertain: ClassVar[str] = "the range of gamma, which is from accounts of the paper"
    unit: ClassVar[str] = "pair"
    needs_reference: ClassVar[bool] = False

    gamma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.gamma", self.gamma)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards m_w and m_l (2 * pairs,)."""
        rewards = inputs.policy.means()
        return LossOutput(F.relu(self.gamma - rewards[0::2] + rewards[1::2]), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """The same formula of the reference's own mean log-probs."""
        means = torch.stack([inputs.policy.sequence(i).double().mean() for i in range(len(inputs.policy))])
        return (self.gamma - means[0::2] + means[1::2]).clamp(min=0)
