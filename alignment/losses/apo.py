"""Anchored preference optimisation, for a policy that is worse or better than the answers; of pairs and of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, WeightedRowLoss, given, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class APOZero(BetaPairLoss):
    """L = S(-beta u) + S(beta v).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, and S is the logistic function.

    It raises the chosen and lowers the rejected completion, each by itself: for a policy whose answers are worse than
    the chosen ones.

    Paper: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = beta S(beta u)
    S(-beta u), G_l the same of v. Both fade as soon as a log-ratio is large on either side.

    Rewards: beta u and beta v.

    Recommended: beta 0.1 (the paper); SmolLM3 took 0.05.

    Deviations: none. The paper's L is ours less 1, as it writes -S(beta u); TRL's `apo_zero` is the same as ours.
    """

    name: ClassVar[str] = "apo_zero"
    title: ClassVar[str] = "APO-zero"
    purpose: ClassVar[str] = "chosen up, rejected down: for data better than the policy"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        losses = torch.sigmoid(-rewards[0::2]) + torch.sigmoid(rewards[1::2])
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """1 for every pair."""
        return per_pair(inputs.policy, 1.0)


@dataclass(kw_only=True)
class APODown(BetaPairLoss):
    """L = S(beta u) + S(-beta d).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, d = u - v, and S is the logistic function.

    It lowers the rejected completion more than the chosen one, and the chosen one too: for a policy whose answers are
    better than the chosen ones.

    Paper: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l, with s(x) = S(x) S(-x):
    G_w = beta (s(beta d) - s(beta u)), which lowers the chosen completion where u is nearer to 0 than d is; G_l = beta
    s(beta d).

    Rewards: beta u and beta v.

    Recommended: beta 0.1 (the paper).

    Deviations: none. The paper's L is ours less 1, as it writes -S(beta d); TRL's `apo_down` is the same as ours.
    """

    name: ClassVar[str] = "apo_down"
    title: ClassVar[str] = "APO-down"
    purpose: ClassVar[str] = "both down, rejected further: for data worse than the policy"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        losses = torch.sigmoid(rewards[0::2]) + torch.sigmoid(rewards[1::2] - rewards[0::2])
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """1 for every pair."""
        return per_pair(inputs.policy, 1.0)


@dataclass(kw_only=True)
class APOZeroUnpaired(WeightedRowLoss):
    """L = weight_d S(-beta u) for a desirable, weight_u S(beta u) for an undesirable row.

    u is the log-ratio log pi(y|x) - log pi_ref(y|x), *summed* over the completion's tokens; S is the logistic function.

    APO-zero is a sum of two terms with one answer each, so that it needs no pairs. It is KTO with z0 = 0: no answers to
    other prompts are scored, and a step may have one row.

    Paper: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7, term by term.

    Gradient of -L per token, upwards for a desirable (G_w), downwards for an undesirable row (G_l):
    G_w = weight_d beta S(beta u) S(-beta u), G_l = weight_u beta S(beta u) S(-beta u).

    Rewards: beta u.

    Recommended: beta 0.1 (the paper, for pairs), weights 1.

    Deviations: none. The mean is over rows, so that on pairs with weights 1 it is half of `apo_zero`. TRL's KTO with
    the loss type `apo_zero_unpaired` is the same as ours.
    """

    name: ClassVar[str] = "apo_zero_unpaired"
    title: ClassVar[str] = "APO-zero, rows"
    purpose: ClassVar[str] = "KTO without its KL: good answers up, bad answers down"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (rows,), rewards beta u (rows,)."""
        labels = given(inputs.labels, "LossInputs.labels")
        rewards = self.beta * log_ratios(inputs).sums()
        signs = rewards.new_tensor([1.0, -1.0])[labels.long()]
        return LossOutput(self.weights_of(rewards, labels) * torch.sigmoid(signs * rewards), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Half the weight of every row: u is 0."""
        return self.weights_of(inputs.policy.values.double(), given(inputs.labels, "LossInputs.labels")) / 2
