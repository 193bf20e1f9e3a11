"""On-policy distillation: the policy's own answers, and a teacher's log-probs of their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from alignment.errors import positive
from alignment.losses.base import Loss, LossInputs, LossOutput, given
from alignment.types import RaggedLogps


class Credit(Enum):
    """Which tokens a token answers for."""

    token = "token"
    """Itself alone."""

    rest = "rest"
    """Itself and all that follow it in the answer."""


@dataclass(kw_only=True)
class OPD(Loss):
    """L = k sum over t of (p_t / d_t) coef D_t, on answers that the policy itself has drawn at temperature 1.

    p_t is the policy's probability of token t of an answer, d_t that of the policy that drew it, q_t the teacher's, the
    reference here. D_t is log p_t - log q_t with `credit` token; with rest it is the sum of that over t and all later
    tokens. D_t is a number without gradient, and so is d_t: only the p_t of the ratio has one. k is items over tokens
    of the step, so that the mean over the items is the *mean* over all tokens of the step. In the first step after a
    draw p = d, and the loss with credit token is coef times the sampled KL(policy || teacher) per token.

    Papers: Agarwal et al. 2024 (GKD), arXiv:2306.13649, for reverse KL on the student's own answers. This form: Lu and
    Thinking Machines 2025, On-Policy Distillation: advantage -coef (log p - log q), weighted by p / d, discount 0.

    Gradient of -L by log p_t: -k coef (p_t / d_t) D_t. In expectation over answers drawn from p, with k as it is:

    - `rest` gives that of -coef KL(policy || teacher) of whole answers. It is unbiased, and its variance grows with
      their length.
    - `token` gives that of -coef times the sum over t of the KL of the next-token distributions, where the prefixes
      that the policy has drawn are held fixed. As an estimate of the KL of whole answers it is biased: no token answers
      for the states that it leads to. Its variance is far smaller.

    Within a round of several steps p leaves d. The ratio p_t / d_t makes a token's own distribution the policy's again;
    prefixes, and the later tokens that rest adds up, stay those of d, a bias that grows with the steps since the draw.
    The ratio is not clipped.

    Rewards: coef (log q - log p), *summed* over the answer: minus the sampled KL. Part: `drift` is the *mean* of
    log p - log d over an answer, 0 right after a draw.

    Recommended: coef 1 and credit token, as in the source.

    Deviations: the source takes the advantage from the sampler's log-probs, which differ from p by rounding and by the
    steps since the draw, and sums over a batch; here the mean over the step's tokens keeps the learning rate apart from
    batch and length. Without log-probs of who drew, d is p without its gradient.
    """

    name: ClassVar[str] = "opd"
    title: ClassVar[str] = "OPD"
    purpose: ClassVar[str] = "distils a teacher on the policy's own answers"
    unit: ClassVar[str] = "row"
    needs_reference: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    coef: float
    credit: Credit

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.coef", self.coef)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (answers,), rewards (answers,); part `drift` (answers,)."""
        policy, teacher = inputs.policy, given(inputs.reference, "LossInputs.reference")
        now = policy.values.detach()
        gaps = RaggedLogps(now - teacher.values, policy.offsets)
        owed = gaps.values if self.credit is Credit.token else _from_here_on(gaps)
        drift = policy.values - (now if inputs.drawn is None else inputs.drawn.values)
        totals = inputs.step_totals()
        terms = RaggedLogps(self.coef * owed * drift.exp(), policy.offsets)
        drifts = RaggedLogps(drift.detach(), policy.offsets).means()
        return LossOutput(terms.sums() * (totals.items / totals.tokens), -self.coef * gaps.sums(), {"drift": drifts})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """coef times the gap of the t-th token, once with credit token and t times with rest, right after a draw."""
        teacher, totals = given(inputs.reference, "LossInputs.reference"), inputs.step_totals()
        found = []
        for s in range(len(inputs.policy)):
            gap = inputs.policy.sequence(s).double() - teacher.sequence(s).double()
            times = torch.arange(1, len(gap) + 1, device=gap.device) if self.credit is Credit.rest else 1
            found.append(self.coef * (times * gap).sum() * totals.items / totals.tokens)
        return torch.stack(found)


def _from_here_on(ragged: RaggedLogps) -> Tensor:
    """(tokens,) the sum of each token's value and those of all that follow it in its sequence, in float64 inside."""
    values = ragged.values.double()
    before = torch.cat([values.new_zeros(1), values.cumsum(0)])  # of all tokens of all sequences
    ends = before[ragged.offsets[1:]].repeat_interleave(ragged.lengths, output_size=len(values))
    return (ends - before[:-1]).to(ragged.values.dtype)
