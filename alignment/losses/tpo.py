"""Triple preference optimisation: a gold answer to learn from, and a pair to prefer by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative, positive
from alignment.losses.base import LossInputs, LossOutput, given
from alignment.losses.nll import Anchored, NLLReduction, NLLScope


class _Triple(Anchored):
    """Shared by both: lists of three, and a margin of rewards plus the NLL of the gold answer."""

    unit: ClassVar[str] = "list"
    needs_reference: ClassVar[bool] = False
    orders_ties: ClassVar[bool] = True

    beta: float
    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.beta", self.beta)
        positive("loss.alpha", self.alpha)

    def problem(self, completions: int, scores: tuple[float, ...] | None) -> str | None:
        """Gold, chosen, rejected."""
        if completions == 3:
            return None
        return f"has {completions} completions, where three are read, best first: gold, chosen and rejected"

    def _check(self, inputs: LossInputs) -> None:
        if not bool((given(inputs.sizes, "LossInputs.sizes") == 3).all()):
            raise ValueError("TPO needs lists of three completions: gold, chosen and rejected.")

    def _output(self, inputs: LossInputs, rewards: Tensor, target: float) -> LossOutput:
        """The loss of rewards (S,) whose margin is asked to reach the target."""
        self._check(inputs)
        nll = self.nll(inputs)
        losses = self.alpha * nll - F.logsigmoid(rewards[1::3] - rewards[2::3] - target)
        return LossOutput(losses, rewards.detach(), {"nll": nll.detach()})

    def _closed_form(self, inputs: LossInputs, excess: Tensor) -> Tensor:
        """log(1 + e^excess) + alpha NLL, in float64."""
        return torch.logaddexp(torch.zeros_like(excess), excess) + self.alpha * self.nll_by_hand(inputs)


@dataclass(kw_only=True)
class TPO(_Triple):
    """L = -log S(beta (a - b)) + alpha NLL(gold).

    The data are lists of three completions of a prompt, best first: gold, chosen, rejected. a and b are the *summed*
    log-probs of the chosen and the rejected one under the policy; there is no reference model. S is the logistic
    function. NLL is the negative log-likelihood of the gold completion, its summed log-prob times -k, with k by
    `nll_reduction`: token_mean lists of the step / gold tokens of the step, which makes it the *mean* over all those
    tokens; sequence_mean 1 / n_g with n_g the gold completion's length; sequence_sum 1. With `nll_scope`
    prompt_and_response the prompt's tokens join it.

    Paper: Saeidi et al. 2024, arXiv:2405.16681.

    Gradient of -L, per gold token G_g, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_g = alpha k, G_w = G_l = beta S(-beta (a - b)).

    Rewards: beta times the summed log-prob, of all three; the objective compares the second with the third. Parts:
    `nll` is the NLL.

    Recommended (the authors' README): beta 0.01, learning rate 5e-7 and alpha 1 for base models, 1e-6 and 0.05 for
    instruct models. Their triples from UltraFeedback: of the scored answers to a prompt the best is gold, the second
    chosen, the worst rejected.

    Deviations: the authors' code and TRL take the NLL's mean over the tokens of one micro-batch, here it is over the
    optimizer step. Both offer label smoothing, off by default, a hinge and IPO, which are left out.
    """

    name: ClassVar[str] = "tpo"
    title: ClassVar[str] = "TPO"
    purpose: ClassVar[str] = "fine-tunes on a gold answer and compares two others"

    beta: float
    alpha: float
    nll_reduction: NLLReduction
    nll_scope: NLLScope

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (lists,), rewards (3 * lists,); part `nll` (lists,)."""
        return self._output(inputs, self.beta * inputs.policy.sums(), 0.0)

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + exp(-beta (a - b))) + alpha NLL of the reference's own log-probs."""
        self._check(inputs)
        sums = torch.stack([inputs.policy.sequence(i).double().sum() for i in range(len(inputs.policy))])
        return self._closed_form(inputs, -self.beta * (sums[1::3] - sums[2::3]))


@dataclass(kw_only=True)
class TPOL(_Triple):
    """L = -log S(beta (a - b) - gamma) + alpha NLL(gold), with gamma = beta * gamma_beta_ratio.

    TPO with length normalisation: a and b are the *mean* log-probs per token of the chosen and the rejected completion,
    and gamma is a margin that they are asked to keep. All else is as in `tpo`.

    Paper: Saeidi et al. 2024, arXiv:2405.16681, under the name TPO-L.

    Gradient of -L, per gold token G_g, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_g = alpha k, G_w = beta S(gamma - beta (a - b)) / n_w, G_l the same over n_l, with n_w and n_l the lengths.

    Rewards: beta times the mean log-prob, of all three; the objective compares the second with the third. Parts: `nll`
    is the NLL.

    Recommended (the authors' README): beta 2, gamma 1.6 (a ratio of 0.8), alpha 0.05, learning rate 5e-7 for a Mistral
    base model; beta 10, gamma 3 (0.3), alpha 0.05, 1e-6 for Llama 3 instruct; beta 2.5, gamma 0.3 (0.12), alpha 0.05,
    1e-6 for Mistral instruct.

    Deviations: the authors' code and TRL take gamma (`tpo_l_gamma`) instead of the ratio; the rest as in `tpo`.
    """

    name: ClassVar[str] = "tpo_l"
    title: ClassVar[str] = "TPO-L"
    purpose: ClassVar[str] = "TPO without a preference for short or long answers"

    beta: float
    gamma_beta_ratio: float
    alpha: float
    nll_reduction: NLLReduction
    nll_scope: NLLScope

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.gamma_beta_ratio", self.gamma_beta_ratio)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (lists,), rewards (3 * lists,); part `nll` (lists,)."""
        return self._output(inputs, self.beta * inputs.policy.means(), self.beta * self.gamma_beta_ratio)

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + exp(beta (gamma / beta - a + b))) + alpha NLL of the reference's own log-probs."""
        self._check(inputs)
        means = torch.stack([inputs.policy.sequence(i).double().mean() for i in range(len(inputs.policy))])
        return self._closed_form(inputs, self.beta * (self.gamma_beta_ratio - means[1::3] + means[2::3]))
