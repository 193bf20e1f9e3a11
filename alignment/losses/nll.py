"""The negative log-likelihood of the preferred completions: a loss of its own, and the anchor of other losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from alignment.losses.base import Loss, LossInputs, LossOutput, Requirements, given


class NLLReduction(Enum):
    """How the tokens' negative log-probs become one number."""

    token_mean = "token_mean"
    """Mean over all preferred tokens of the optimizer step: a long completion counts for more."""

    sequence_mean = "sequence_mean"
    """Mean over the completion's own tokens, then over the items: every completion counts the same."""

    sequence_sum = "sequence_sum"
    """Sum over the completion's tokens, then the mean over the items."""


class NLLScope(Enum):
    """Whose tokens are meant."""

    response = "response"
    prompt_and_response = "prompt_and_response"
    """The prompt's tokens too, all but the first, which nothing predicts."""


def nll(inputs: LossInputs, reduction: NLLReduction, scope: NLLScope) -> Tensor:
    """(items,) negative log-likelihood of the preferred completions; their mean over items is the reduction's value.

    An undesirable row favours nothing and counts as 0. For `token_mean` a sequence's sum is multiplied by items over
    tokens of the whole step, so that the split of a step into parts changes nothing.
    """
    sums, lengths = inputs.policy.sums(), inputs.policy.lengths
    if inputs.labels is None:
        first = inputs.first_sequences()
        sums, lengths = sums.index_select(0, first), lengths.index_select(0, first)
    if scope is NLLScope.prompt_and_response:
        prompts = given(inputs.prompts, "LossInputs.prompts")
        sums, lengths = sums + prompts.sums(), lengths + prompts.lengths
    if inputs.labels is not None:
        sums = torch.where(inputs.labels, sums, torch.zeros_like(sums))
    if reduction is NLLReduction.sequence_sum:
        return -sums
    if reduction is NLLReduction.sequence_mean:
        return -sums / lengths
    totals = inputs.step_totals()
    tokens = totals.tokens + (totals.prompt_tokens if scope is NLLScope.prompt_and_response else 0)
    return -sums * (totals.items / max(tokens, 1))  # a step of undesirable rows alone has no token


def nll_by_hand(inputs: LossInputs, reduction: NLLReduction, scope: NLLScope) -> Tensor:
    """(items,) float64: the same, item by item and without the ragged sums, for `Loss.at_reference`."""
    preferred = inputs.preferred().tolist()
    sequences = [s for s in range(len(preferred)) if preferred[s] or inputs.labels is not None]
    values, lengths = [], []
    for item, s in enumerate(sequences):
        tokens = [inputs.policy.sequence(s).double()]
        if scope is NLLScope.prompt_and_response:
            tokens.append(given(inputs.prompts, "LossInputs.prompts").sequence(item).double())
        values.append(-torch.cat(tokens).sum() * preferred[s])
        lengths.append(sum(len(t) for t in tokens))
    if reduction is NLLReduction.sequence_mean:
        return torch.stack([value / length for value, length in zip(values, lengths, strict=True)])
    if reduction is NLLReduction.token_mean:
        totals = inputs.step_totals()
        prompts = totals.prompt_tokens if scope is NLLScope.prompt_and_response else 0
        return torch.stack(values) * totals.items / max(totals.tokens + prompts, 1)
    return torch.stack(values)


class Anchored(Loss):
    """A loss with the NLL of the preferred completion as one of its terms."""

    nll_reduction: NLLReduction
    nll_scope: NLLScope

    def requirements(self) -> Requirements:
        """The prompts' log-probs too, where the scope includes them."""
        prompts = self.nll_scope is NLLScope.prompt_and_response
        return replace(super().requirements(), prompts=prompts)

    def nll(self, inputs: LossInputs) -> Tensor:
        """(items,) the term with this loss's reduction and scope."""
        return nll(inputs, self.nll_reduction, self.nll_scope)

    def nll_by_hand(self, inputs: LossInputs) -> Tensor:
        """(items,) float64: the same for `at_reference`."""
        return nll_by_hand(inputs, self.nll_reduction, self.nll_scope)


@dataclass(kw_only=True)
class NLL(Anchored):
    """L = -a k, the negative log-likelihood of the preferred completion alone, which is supervised fine-tuning on it.

    a is the *summed* log-prob of the chosen completion under the policy; there is no reference, and the rejected
    completion is not read. k is by `nll_reduction`: token_mean pairs of the step / chosen tokens of the step, so that
    the mean over the pairs is the *mean* over all those tokens; sequence_mean 1 / n_w with n_w the completion's length;
    sequence_sum 1. With `nll_scope` prompt_and_response the prompt's tokens but the first join a, n_w and the step's
    tokens.

    It serves as a part of mixtures. In rows the preferred completions are the desirable ones, and the others count as
    0; in lists it is the first.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = k, G_l = 0.

    Rewards: the *mean* log-prob of every completion, and for sequence_sum the sum.

    Recommended: token_mean over the response, the usual loss of supervised fine-tuning.

    Deviations: TRL's `sft` loss is token_mean over one micro-batch of one process; here it is over the whole optimizer
    step, so that the split of a step into forward passes changes nothing.
    """

    name: ClassVar[str] = "nll"
    title: ClassVar[str] = "NLL"
    purpose: ClassVar[str] = "supervised fine-tuning on the chosen answer; part of mixtures"
    unit: ClassVar[str] = "pair"
    needs_reference: ClassVar[bool] = False

    nll_reduction: NLLReduction
    nll_scope: NLLScope

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (items,), rewards: mean or summed log-probs (S,)."""
        policy = inputs.policy.detach()
        rewards = policy.sums() if self.nll_reduction is NLLReduction.sequence_sum else policy.means()
        return LossOutput(self.nll(inputs), rewards)

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """The same formula of the reference's own log-probs."""
        return self.nll_by_hand(inputs)
