"""Noise contrastive alignment with scores: lists of completions against soft targets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import positive
from alignment.losses.base import LossInputs, LossOutput
from alignment.losses.lists import BetaListLoss, lowest, members, scores_of, sizes_of, table


@dataclass(kw_only=True)
class _SoftTargets(BetaListLoss):
    needs_scores: ClassVar[bool] = True

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.alpha", self.alpha)

    def _targets(self, inputs: LossInputs) -> Tensor:
        """(lists, longest list) float64, 1 in every line."""
        scores = scores_of(inputs).masked_fill(~members(sizes_of(inputs)), -math.inf)
        return (scores / self.alpha).softmax(1)


@dataclass(kw_only=True)
class InfoNCA(_SoftTargets):
    """L = -sum_i t_i log(e^r_i / sum_j e^r_j), with r = beta u and the targets t = softmax(score / alpha) of a list.

    u is the log-ratio log pi(y|x) - log pi_ref(y|x) of a completion, *summed* over its tokens. As alpha goes to 0 the
    best completion takes all of the target, and the loss becomes `best_vs_rest`; with two completions, `dpo`.

    Paper: Chen et al. 2024, arXiv:2402.05369.

    Gradient of -L per token of completion i: with p = softmax(r), G_i = beta (t_i - p_i).

    Rewards: r.

    Recommended: beta 0.01 and alpha 1e-4 (the authors' settings for 7B models on UltraFeedback, learning rate 5e-6).
    With scores of 1 to 10 such an alpha leaves nothing soft: an alpha near 1 does.

    Deviations: none from the paper's formula. The authors' code adds 0.01 to the first completion's score, so that the
    best of several equal ones is one; here they share the target. TRL has pairs only, where it is its `sigmoid`.
    """

    name: ClassVar[str] = "infonca"
    title: ClassVar[str] = "InfoNCA"
    purpose: ClassVar[str] = "for scored lists: rewards follow the softmax of the scores"

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (lists,), rewards beta u (S,)."""
        sizes = sizes_of(inputs)
        rewards = self.rewards(inputs)
        by_list = table(rewards, sizes).masked_fill(~members(sizes), lowest(rewards.dtype))
        losses = -(self._targets(inputs).to(rewards.dtype) * by_list.log_softmax(1)).sum(1)
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log K, whatever the scores."""
        return sizes_of(inputs).double().log()


@dataclass(kw_only=True)
class NCAList(_SoftTargets):
    """L = -sum_i (t_i log S(r_i) + 1/K log S(-r_i)), with r = beta u and t = softmax(score / alpha) of a list of K.

    u is the log-ratio log pi(y|x) - log pi_ref(y|x) of a completion, *summed* over its tokens; S is the logistic
    function. Every reward is trained by itself and not against the others, so that the likelihood of good completions
    is anchored. As alpha goes to 0, with two completions, it is `nca`.

    Paper: Chen et al. 2024, arXiv:2402.05369.

    Gradient of -L per token of completion i: G_i = beta (t_i S(-r_i) - S(r_i) / K), zero at r_i = log(K t_i).

    Rewards: r.

    Recommended: beta 0.01 and alpha 1e-4 (the authors' settings for 7B models on UltraFeedback, learning rate 5e-6).
    With scores of 1 to 10 such an alpha leaves nothing soft: an alpha near 1 does.

    Deviations: none from the authors' code but one: it adds 0.01 to the first completion's score, so that the best of
    several equal ones is one; here they share the target. TRL has it for pairs only.
    """

    name: ClassVar[str] = "nca_list"
    title: ClassVar[str] = "NCA-list"
    purpose: ClassVar[str] = "for scored lists: NCA, which keeps good answers likely"

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (lists,), rewards beta u (S,)."""
        sizes = sizes_of(inputs)
        rewards = self.rewards(inputs)
        by_list = table(rewards, sizes)
        against = members(sizes) / sizes[:, None].to(rewards.dtype)
        losses = self._targets(inputs).to(rewards.dtype) * F.logsigmoid(by_list) + against * F.logsigmoid(-by_list)
        return LossOutput(-losses.sum(1), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """2 log 2 for every list."""
        return torch.full_like(sizes_of(inputs), 2 * math.log(2), dtype=torch.float64)
