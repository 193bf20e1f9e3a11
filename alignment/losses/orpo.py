"""Odds ratio preference optimisation: SFT with an odds-ratio term, without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative
from alignment.losses.base import LossInputs, LossOutput
from alignment.losses.nll import Anchored, NLLReduction, NLLScope

CEILING = -1e-10
"""The mean log-prob, in nats, from which on the odds p / (1 - p) stop growing.

It only stands in for a mean of exactly 0 and for rounding above 0, whose odds are infinite: log-probs next to 0 are
multiples of 1.2e-7 in float32, so their mean over a thousand tokens is still below it.
"""


def log_odds(means: Tensor) -> Tensor:
    """log(p / (1 - p)) for mean log-probs log p <= 0, in their shape and dtype.

    One form serves the whole range: -expm1 is exact where p is close to 1, and where p is small its rounding is lost
    in log p. Two branches under `torch.where` would bring the unused one's infinite derivative into the gradient.
    Above `CEILING` the derivative is 1 instead of 1 / (1 - p): finite, and of the right sign.
    """
    return means - torch.log(-torch.expm1(means.clamp(max=CEILING)))


@dataclass(kw_only=True)
class ORPO(Anchored):
    """L = NLL - lam log S(w), with w = log(p_w / (1 - p_w)) - log(p_l / (1 - p_l)).

    a = log p_w and b = log p_l are the *mean* log-probs per token of the chosen and the rejected completion under the
    policy; there is no reference. S is the logistic function. NLL is the SFT term, the negative log-likelihood of the
    chosen completion: its summed log-prob times -k, with k by `nll_reduction`: sequence_mean 1 / n_w with n_w the
    completion's length, so that the NLL is -a; token_mean pairs of the step / chosen tokens of the step; sequence_sum
    1. With `nll_scope` prompt_and_response the prompt's tokens but the first join the sum and the counts.

    Paper: Hong, Lee and Thorne 2024, arXiv:2403.07691, Eqs. 4, 6 and 7; lam is its lambda.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = k + lam S(-w) / ((1 - p_w) n_w), G_l = lam S(-w) / ((1 - p_l) n_l), with n_w and n_l the lengths.

    Rewards: the log-odds log(p / (1 - p)), whose difference w is what stands inside the logistic function; lam weights
    the term and scales no reward. Parts: `nll` is the NLL, `log_odds` is w.

    Recommended: lam 0.1 (the authors' Mistral 7B runs), 0.05 for Mixtral 8x22B; 0.1 to 2 in searches.

    Deviations: the paper's SFT term covers the response, and by default so does this one; the authors' code (by
    default) and TRL have prompt_and_response and token_mean, TRL over one micro-batch instead of the optimizer step.
    The authors' response mask also scores one token after the end and divides by n + 1. TRL casts to float32, logs
    lam a and lam b as rewards, and its log(1 - p) has a NaN gradient where a mean log-prob comes within 3e-8 of 0.
    """

    name: ClassVar[str] = "orpo"
    title: ClassVar[str] = "ORPO"
    purpose: ClassVar[str] = "fine-tunes and aligns a base model in one stage"
    unit: ClassVar[str] = "pair"
    needs_reference: ClassVar[bool] = False

    lam: float
    nll_reduction: NLLReduction
    nll_scope: NLLScope

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.lam", self.lam)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards: log-odds (2 * pairs,); parts `nll` and `log_odds` (pairs,)."""
        means = inputs.policy.means()
        rewards = log_odds(means)
        nll, ratio = self.nll(inputs), rewards[0::2] - rewards[1::2]
        losses = nll - self.lam * F.logsigmoid(ratio)
        return LossOutput(losses, rewards.detach(), {"nll": nll.detach(), "log_odds": ratio.detach()})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """NLL + lam log(1 + odds_l / odds_w) of the reference's own mean log-probs."""
        means = torch.stack([inputs.policy.sequence(i).double().mean() for i in range(len(inputs.policy))])
        log_p = means.clamp(max=CEILING)
        log_q = torch.log1p(-torch.exp(log_p))
        against = (log_p[1::2] + log_q[0::2]) - (log_p[0::2] + log_q[1::2])
        return self.nll_by_hand(inputs) + self.lam * torch.logaddexp(torch.zeros_like(against), against)
