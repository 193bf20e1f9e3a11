"""Trust-region on-policy distillation: reverse KL where the teacher is to be trusted, forward KL elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from alignment.errors import positive, require
from alignment.losses.base import Loss, LossInputs, LossOutput, Requirements, given
from alignment.types import Quantity, RaggedLogps


class Outliers(Enum):
    """What is learnt at a token of the policy that the teacher is not trusted with."""

    forward_kl = "forward_kl"
    """The teacher's likeliest tokens in its place."""

    mask = "mask"
    """Nothing."""


@dataclass(kw_only=True)
class TrOPD(Loss):
    """L = k coef sum over t of (p_t / d_t) (M_t D_t + (1 - M_t) F_t), on answers that the policy itself has drawn at
    temperature 1.

    p_t, d_t and q_t are the probabilities of token t under the policy, under the policy that drew it, and under the
    teacher, the reference here; D_t = log p_t - log q_t, and k is items over tokens of the step, all as in OPD. M_t is
    1 with probability min(q_t / p_t, 1) and 0 otherwise, drawn anew in every step. F_t = sum over v of
    q_tv (log q_tv - log p_tv) over the `top_k` likeliest next tokens v of the teacher at that place; with `outliers`
    mask it is 0. D_t, M_t and d_t are numbers without gradient. So is the ratio p_t / d_t before F_t; in F_t the log
    p_tv have one.

    Paper: Xing et al. 2026, arXiv:2606.01249. Its code is not published: this follows reading notes of its formulas.

    Gradient of -L by log p_t: -k coef (p_t / d_t) M_t D_t; by the logit of token v at t, in addition,
    -k coef (p_t / d_t) (1 - M_t) (p_tv sum of q_tu - q_tv), where u goes over the likeliest tokens and q_tv is 0 for
    the others. In expectation over p and M, at a given prefix, -L has the gradient of
    -coef (sum over x of min(p_x, q_x) D_x log p_x + TV F), where min and D are numbers and TV is the total variation
    of p and q. Where the teacher finds every token of the answers at least as likely as the policy does, M is 1 and L
    is OPD's with credit token, to the bit.

    Rewards: coef (log q - log p), *summed* over the answer, as in OPD: minus the sampled KL. Parts: `drift` as in OPD,
    and `trusted`, the *mean* of M over an answer.

    Recommended: top_k 64 and outliers forward_kl: the paper reports a mean score of 46.79 for OPD, 47.72 with outliers
    masked, 49.00 with their forward KL, and 49.85 with its guidance, too. coef 1, as in OPD.

    Deviations: the paper's third part, answers that begin with a prefix of the teacher's whose forward KL counts with
    0.001, is not here, and neither is its clipping of outliers, whose threshold we do not know. We do not know either
    whether the teacher's `top_k` probabilities add up to 1 (`renormalise`), nor what the paper gives a gradient: here M
    and D have none. In float64, M depends on the seed of the run, the tokens of the prompt and the answer, and the step
    alone. Outside training nothing is drawn, and M is its mean min(q / p, 1).
    """

    name: ClassVar[str] = "tropd"
    title: ClassVar[str] = "TrOPD"
    purpose: ClassVar[str] = "distils a teacher by trust, its likeliest tokens elsewhere"
    uncertain: ClassVar[str] = (
        "The code is not published, and what is known of the paper leaves open whether the teacher's likeliest "
        "probabilities are scaled, and what has a gradient"
    )
    unit: ClassVar[str] = "row"
    needs_reference: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    coef: float
    outliers: Outliers
    top_k: int
    renormalise: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.coef", self.coef)
        require(self.top_k >= 1, f"loss.top_k must be at least 1, not {self.top_k}.")
        require(
            self.outliers is Outliers.forward_kl or not self.renormalise,
            "loss.renormalise has no effect with loss.outliers=mask, where no forward KL is computed: set it to false.",
        )

    def requirements(self) -> Requirements:
        """The forward KL only where outliers have one."""
        needs = super().requirements()
        if self.outliers is Outliers.mask:
            return needs
        wanted = frozenset({Quantity.forward_kl})
        return replace(needs, quantities=wanted, likeliest=self.top_k, renormalise=self.renormalise)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (answers,), rewards (answers,); parts `drift` and `trusted` (answers,)."""
        policy, teacher = inputs.policy, given(inputs.reference, "LossInputs.reference")
        now = policy.values.detach()
        gaps = RaggedLogps(now - teacher.values, policy.offsets)
        drift = policy.values - (now if inputs.drawn is None else inputs.drawn.values)
        trusted, ratios, totals = _trusted(inputs, gaps), drift.exp(), inputs.step_totals()
        terms = trusted * gaps.values * ratios
        if self.outliers is Outliers.forward_kl:
            terms = terms + (1 - trusted) * ratios.detach() * inputs.quantities[Quantity.forward_kl].values
        drifts, shares = (RaggedLogps(one.detach(), policy.offsets).means() for one in (drift, trusted))
        losses = RaggedLogps(self.coef * terms, policy.offsets).sums() * (totals.items / totals.tokens)
        return LossOutput(losses, -self.coef * gaps.sums(), {"drift": drifts, "trusted": shares})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """coef times min(q / p, 1) gap + max(1 - q / p, 0) F, summed over the tokens, right after a draw."""
        teacher, totals = given(inputs.reference, "LossInputs.reference"), inputs.step_totals()
        found = []
        for s in range(len(inputs.policy)):
            gap = inputs.policy.sequence(s).double() - teacher.sequence(s).double()
            accepted = torch.minimum(torch.exp(-gap), torch.ones_like(gap))
            value = (accepted * gap).sum()
            if self.outliers is Outliers.forward_kl:
                value += ((1 - accepted) * inputs.quantities[Quantity.forward_kl].sequence(s).double()).sum()
            found.append(self.coef * value * totals.items / totals.tokens)
        return torch.stack(found)


def _trusted(inputs: LossInputs, gaps: RaggedLogps) -> Tensor:
    """(tokens,) M: 1 for the tokens that are trusted, 0 for the others; its mean where there are no seeds.

    Args:
        gaps: log p - log q.
    """
    accepted = (-gaps.values.double()).clamp(max=0).exp()
    if inputs.seeds is None:
        return accepted.to(gaps.values.dtype)
    drawn = [
        torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for length, seed in zip(gaps.lengths.tolist(), inputs.seeds.tolist(), strict=True)
    ]
    return (torch.cat(drawn).to(accepted.device) < accepted).to(gaps.values.dtype)
