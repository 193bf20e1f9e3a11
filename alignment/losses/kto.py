"""Kahneman-Tversky optimisation: single completions with a label, against a running estimate of the KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignment.losses.base import LossInputs, LossOutput, WeightedRowLoss, given
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class KTO(WeightedRowLoss):
    """L = weight_d (1 - S(beta (u - z0))) for a desirable, weight_u (1 - S(beta (z0 - u))) for an undesirable row.

    u is the log-ratio log pi(y|x) - log pi_ref(y|x), *summed* over the completion's tokens; S is the logistic function.
    z0 = max(0, mean over the step of log pi(y_j|x_i) - log pi_ref(y_j|x_i)) estimates KL(pi || pi_ref) from mismatched
    rows: prompt i with the completion of row j = i + 1, the last with the first. The mean is taken over the whole
    optimizer step first and clamped after; z0 carries no gradient and stands inside beta.

    Paper: Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7 by the numbers of its first version.

    Gradient of -L per token, upwards for a desirable (G_w), downwards for an undesirable row (G_l):
    G_w = weight_d beta S'(beta (u - z0)), G_l = weight_u beta S'(beta (u - z0)), with S' = S (1 - S).

    Rewards: beta u. Parts: `kl` is z0, the same for every row.

    Recommended: beta 0.1 (0.05 to 0.5 by model in the paper's last version), weights 1; with unequal numbers n_d and
    n_u of rows, weight_d n_d / (weight_u n_u) in [1, 3/2] (4/3 in the first version). At least two rows a step.

    Deviations: the authors' code and TRL estimate z0 from one micro-batch (TRL: of one process, then the mean over
    processes); here it covers the whole step, so that the split of a step into forward passes changes nothing. TRL
    shifts the other way, prompt i with completion i - 1. The authors' code logs u as reward, TRL beta u.
    """

    name: ClassVar[str] = "kto"
    title: ClassVar[str] = "KTO"
    purpose: ClassVar[str] = "for single answers marked good or bad, without pairs"
    uncertain: ClassVar[str] = "the range of the weights in the paper's last version, which is from accounts of it"
    needs_reference: ClassVar[bool] = True
    min_items: ClassVar[int] = 2

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (rows,), rewards beta u (rows,); part `kl` (rows,). `step_statistics` must cover the whole step."""
        labels = given(inputs.labels, "LossInputs.labels")
        sums = given(step_statistics, "step_statistics of the step's mismatched rows")
        ratios = log_ratios(inputs).sums()
        z0 = (sums[0] / sums[1]).clamp(min=0).detach()
        signs = ratios.new_tensor([-1.0, 1.0])[labels.long()]
        losses = self.weights_of(ratios, labels) * torch.sigmoid(self.beta * signs * (z0 - ratios))
        return LossOutput(losses, self.beta * ratios.detach(), {"kl": z0.expand(len(ratios))})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Half the weight of every row: u and z0 are both 0."""
        return self.weights_of(inputs.policy.values.double(), given(inputs.labels, "LossInputs.labels")) / 2

    def mismatched(self, num_items: int) -> list[tuple[int, int]]:
        """Every prompt with the next row's completion, the last with the first."""
        if num_items < self.min_items:
            raise ValueError("The only row of a step has no mismatched completion.")
        return [(i, (i + 1) % num_items) for i in range(num_items)]

    def step_statistics(self, mismatched: LossInputs) -> Tensor:
        """(2,) detached: the sum of the mismatched rows' log-ratios in nats, and their number."""
        ratios = log_ratios(mismatched).sums().detach()
        return torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])
