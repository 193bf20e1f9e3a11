"""Sequence likelihood calibration, with its hinge on the policy's own log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative
from alignment.losses.base import Loss, LossInputs, LossOutput


@dataclass(kw_only=True)
class SLiCHF(Loss):
    """L = max(0, delta - a + b) - lam a.

    a and b are the *summed* log-probs of the chosen and the rejected completion under the policy; there is no
    reference. The second term keeps the chosen completion likely.

    Paper: Zhao et al. 2023, arXiv:2305.10425.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = 1 + lam and G_l = 1
    where a - b < delta, G_w = lam and G_l = 0 elsewhere.

    Rewards: a and b.

    Recommended: delta 1, lam 0.1 (HALOs); searches take delta 0.1 to 2 and lam 0.1 to 10.

    Deviations: the paper regularises towards SFT answers; here, as is usual, these are the chosen ones. TRL's `hinge`
    is another loss: the hinge of the log-ratios, `hinge` here.
    """

    name: ClassVar[str] = "slic_hf"
    title: ClassVar[str] = "SLiC-HF"
    purpose: ClassVar[str] = "a hinge on log-probs plus a fine-tuning term"
    unit: ClassVar[str] = "pair"
    needs_reference: ClassVar[bool] = False

    delta: float
    lam: float

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.delta", self.delta)
        not_negative("loss.lam", self.lam)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards a and b (2 * pairs,)."""
        rewards = inputs.policy.sums()
        chosen, rejected = rewards[0::2], rewards[1::2]
        return LossOutput(F.relu(self.delta - chosen + rejected) - self.lam * chosen, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """The same formula of the reference's own log-probs."""
        sums = torch.stack([inputs.policy.sequence(i).double().sum() for i in range(len(inputs.policy))])
        return (self.delta - sums[0::2] + sums[1::2]).clamp(min=0) - self.lam * sums[0::2]
