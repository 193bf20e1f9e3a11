"""Contrastive preference optimisation: DPO without a reference, anchored by the NLL; and SimPO with that anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative, positive, within
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput
from alignment.losses.nll import Anchored, NLLReduction, NLLScope


@dataclass(kw_only=True)
class CPO(Anchored, BetaPairLoss):
    """L = -(1 - e) log S(beta (a - b)) - e log S(-beta (a - b)) - lam a k.

    a and b are the *summed* log-probs of the chosen and the rejected completion under the policy; there is no
    reference. S is the logistic function and e is `label_smoothing`, the assumed rate of swapped labels. -a k is the
    NLL of the chosen completion, with k by `nll_reduction`: token_mean pairs of the step / chosen tokens of the step,
    which makes it the *mean* over all those tokens; sequence_mean 1 / n_w with n_w the completion's length;
    sequence_sum 1. With `nll_scope` prompt_and_response the prompt's tokens join the NLL.

    Paper: Xu et al. 2024, arXiv:2401.08417; lam is the weight of its L_NLL, 1 there.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_l = beta (S(-beta (a - b)) - e), G_w = G_l + lam k.

    Rewards: beta a and beta b. Parts: `nll` is -a k.

    Recommended: beta 0.1 (0.01, 0.05 and 0.1 in searches), lam 1, e 0. lam 0 leaves the preference term alone.

    Deviations: the paper writes the NLL as -a, sequence_sum here; the authors' code and TRL take the mean over the
    tokens of one micro-batch, which is 1 / n of it and the default here, over the whole optimizer step. The smoothing
    is in both codes, off by default. TRL's `CPOTrainer` calls lam `cpo_alpha`.
    """

    name: ClassVar[str] = "cpo"
    title: ClassVar[str] = "CPO"
    purpose: ClassVar[str] = "DPO without a reference, kept in place by an NLL term"
    needs_reference: ClassVar[bool] = False

    lam: float
    label_smoothing: float
    nll_reduction: NLLReduction
    nll_scope: NLLScope

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.lam", self.lam)
        within("loss.label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta a and beta b (2 * pairs,); part `nll` (pairs,)."""
        rewards = self.beta * inputs.policy.sums()
        margins = rewards[0::2] - rewards[1::2]
        losses = -(1 - self.label_smoothing) * F.logsigmoid(margins) - self.label_smoothing * F.logsigmoid(-margins)
        nll = self.nll(inputs)
        return LossOutput(losses + self.lam * nll, rewards.detach(), {"nll": nll.detach()})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + exp(-m)) + e m + lam NLL with m = beta (a - b), of the reference's own log-probs."""
        sums = torch.stack([inputs.policy.sequence(i).double().sum() for i in range(len(inputs.policy))])
        margins = self.beta * (sums[0::2] - sums[1::2])
        preference = torch.logaddexp(torch.zeros_like(margins), -margins) + self.label_smoothing * margins
        return preference + self.lam * self.nll_by_hand(inputs)


@dataclass(kw_only=True)
class CPOSimPO(Anchored, BetaPairLoss):
    """L = -log S(beta (a - b) - gamma) + alpha NLL, with gamma = beta * gamma_beta_ratio.

    a and b are the *mean* log-probs per token of the chosen and the rejected completion under the policy; there is no
    reference. S is the logistic function. NLL is the negative log-likelihood of the chosen completion, its summed
    log-prob times -k, with k by `nll_reduction`: token_mean pairs of the step / chosen tokens of the step, which makes
    it the *mean* over all those tokens; sequence_mean 1 / n_w with n_w the completion's length; sequence_sum 1. With
    `nll_scope` prompt_and_response the prompt's tokens join it. alpha = 0 is `simpo`.

    Paper: none; the repository fe1ixxu/CPO_SIMPO, by the author of CPO, joins arXiv:2405.14734 and arXiv:2401.08417.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = beta S(gamma - beta (a - b)) / n_w + alpha k, G_l = beta S(gamma - beta (a - b)) / n_l.

    Rewards: beta a and beta b. Parts: `nll` is the NLL.

    Recommended (the repository, Llama 3 8B instruct): beta 10, gamma 5.4 (a ratio of 0.54), alpha 0.05, learning rate
    1e-6.

    Deviations: the authors' code and TRL (`CPOTrainer`, `simpo`, with `cpo_alpha` 1 by default) take gamma instead of
    the ratio and the NLL's mean over one micro-batch instead of the optimizer step; both offer label smoothing, off by
    default and left out.
    """

    name: ClassVar[str] = "cpo_simpo"
    title: ClassVar[str] = "CPO-SimPO"
    purpose: ClassVar[str] = "SimPO kept in place by an NLL term"
    needs_reference: ClassVar[bool] = False

    gamma_beta_ratio: float
    alpha: float
    nll_reduction: NLLReduction
    nll_scope: NLLScope

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.gamma_beta_ratio", self.gamma_beta_ratio)
        positive("loss.alpha", self.alpha)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta a and beta b (2 * pairs,); part `nll` (pairs,)."""
        rewards = self.beta * inputs.policy.means()
        margins = rewards[0::2] - rewards[1::2] - self.beta * self.gamma_beta_ratio
        nll = self.nll(inputs)
        return LossOutput(self.alpha * nll - F.logsigmoid(margins), rewards.detach(), {"nll": nll.detach()})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + exp(beta (gamma / beta - a + b))) + alpha NLL of the reference's own log-probs."""
        means = torch.stack([inputs.policy.sequence(i).double().mean() for i in range(len(inputs.policy))])
        excess = self.beta * (self.gamma_beta_ratio - means[0::2] + means[1::2])
        return torch.logaddexp(torch.zeros_like(excess), excess) + self.alpha * self.nll_by_hand(inputs)
