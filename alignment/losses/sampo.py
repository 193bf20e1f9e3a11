"""DPO on equally many tokens of both answers, drawn at random from the longer one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios
from alignment.types import RaggedLogps


def _draw(inputs: LossInputs) -> Tensor:
    """(tokens,) bool: as many tokens of each completion as the shorter one of its pair has.

    A completion's draw depends on its pair's seed and on the two lengths alone, not on its place in the step.
    """
    lengths = inputs.policy.lengths.tolist()
    seeds = [0] * (len(lengths) // 2) if inputs.seeds is None else inputs.seeds.tolist()
    drawn = []
    for seed, n_w, n_l in zip(seeds, lengths[0::2], lengths[1::2], strict=True):
        for n in (n_w, n_l):
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            drawn.append(order < min(n_w, n_l))
    return torch.cat(drawn).to(inputs.policy.values.device)


@dataclass(kw_only=True)
class SamPO(BetaPairLoss):
    """L = -log S(beta (u - v)), with u and v the *sums* of the per-token log-ratios log pi - log pi_ref over
    min(n_w, n_l) tokens of the chosen and of the rejected completion.

    n_w and n_l are the lengths and S is the logistic function. Of the longer completion the tokens are drawn at random
    without replacement, anew in every step; the shorter one is read whole. So no reward is larger for being a sum of
    more terms.

    Paper: Lu et al. 2024, arXiv:2406.10957.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: beta S(-beta (u - v)) for
    the tokens in the draw, 0 for the others.

    Rewards: beta u and beta v of the draw.

    Recommended: beta 0.1 (the authors' Llama 3 8B Instruct).

    Deviations: policy and reference share the draw, which is seeded by the pair's content and the step. The authors'
    code draws inside each model's forward pass, so that the two sums are over different tokens and the margin at the
    start is not 0. Outside training the draw is fixed: the same for all pairs of the same two lengths. TRL does not
    have this loss.
    """

    name: ClassVar[str] = "sampo"
    title: ClassVar[str] = "SamPO"
    purpose: ClassVar[str] = "against length: as many random tokens of both answers"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        ratios = log_ratios(inputs)
        rewards = self.beta * RaggedLogps(_draw(inputs) * ratios.values, ratios.offsets).sums()
        return LossOutput(-F.logsigmoid(rewards[0::2] - rewards[1::2]), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair, whatever the draw."""
        return per_pair(inputs.policy, math.log(2))
