"""DPO whose beta follows the margins of every batch, and which leaves out unusual pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative, require, within
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios
from alignment.losses.running import NO_MOMENTS, in_order, moving_moments, standardised

LEAST_BETA = 1e-3
"""A batch's beta is at least this (the authors' code)."""


@dataclass(kw_only=True)
class BetaDPO(BetaPairLoss):
    """L = -(n / k) log S(beta_b d) for the k kept of the step's n pairs, 0 for the others;
    beta_b = max(0.001, beta (1 + alpha (M - m))).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, and d = u - v. M is the *mean* of d over the kept pairs, m and s are moving averages of the mean and
    the standard deviation of d over all pairs: m <- decay m + (1 - decay) mean, from 0 and with this step before they
    are used. All of them, and so beta_b, are without gradient. m and s are kept in checkpoints. By n / k the mean over
    the step's pairs is the mean over the kept ones.

    k is n (1 - dropped_share), rounded down, but at least 1. The kept pairs are drawn without replacement, one after
    the other, with probabilities in proportion to exp(-((d - m) / s)^2 / 2): pairs near the usual margin stay, outliers
    go. Each pair has its own exponential race, a random number from its own seed over its weight, and the k first ones
    to finish are kept; so the draw does not depend on the order of the pairs. Outside training every pair is kept, and
    m and s stay as the last step left them.

    Paper: Wu et al. 2024, arXiv:2407.08639.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = G_l = (n / k) beta_b S(-beta_b d) for a kept pair, 0 for another.

    Rewards: beta u and beta v, with the beta of the settings, as in the authors' code: it is the same in every step.
    Parts: `beta` is beta_b, the same for every pair; `kept` is 1 or 0.

    Recommended: beta 0.1, decay 0.9, dropped_share 0.2 (the paper, whose rho = 0.8 is the kept share; batches of 64,
    learning rate 5e-7), alpha 0.6 (the authors' README).

    Deviations: the authors' code takes micro-batches for batches, updates m and s in evaluations too and drops pairs
    there; it draws on every process from that process's own random state and divides by the pairs that this process
    kept, which is the mean over kept pairs only by chance. The exponential moving averages start at 0 without a
    correction for it, as in that code: in the first steps m and s are far below the margins' own. TRL has no such loss.
    """

    name: ClassVar[str] = "beta_dpo"
    title: ClassVar[str] = "beta-DPO"
    purpose: ClassVar[str] = "for pairs of mixed quality: beta adapts, outliers drop out"
    uncertain: ClassVar[str] = "whether the paper's margins carry beta; those of its authors' code, used here, do not"
    needs_reference: ClassVar[bool] = True
    min_items: ClassVar[int] = 2
    whole_step: ClassVar[bool] = True

    alpha: float
    dropped_share: float
    decay: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta >= LEAST_BETA, f"loss.beta must be at least {LEAST_BETA}, not {self.beta}.")
        not_negative("loss.alpha", self.alpha)
        within("loss.dropped_share", self.dropped_share, "[0, 1)")
        within("loss.decay", self.decay, "[0, 1)")
        require(
            self.alpha > 0 or self.dropped_share > 0,
            "loss.alpha must be above 0 where loss.dropped_share is 0, not 0: without both this is loss=dpo.",
        )

    def initial_state(self) -> dict[str, float]:
        """No step seen."""
        return dict(NO_MOMENTS)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,); parts `beta` and `kept` (pairs,)."""
        ratios = log_ratios(inputs).sums()
        margins = ratios[0::2] - ratios[1::2]
        state, kept = dict(inputs.state), torch.ones_like(margins, dtype=torch.bool)
        if inputs.seeds is not None:
            state = moving_moments(state, margins, self.decay)
            kept = self._draw(margins, state, inputs.seeds)
        mean = in_order(margins[kept]).mean().item()
        beta = max(LEAST_BETA, self.beta * (1 + self.alpha * (mean - state["mean"])))
        share = kept.to(margins.dtype)
        losses = -F.logsigmoid(beta * margins) * share / share.mean()
        parts = {"beta": torch.full_like(share, beta), "kept": share}
        return LossOutput(losses, self.beta * ratios.detach(), parts, state)

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair, whatever beta is."""
        return per_pair(inputs.policy, math.log(2))

    def _draw(self, margins: Tensor, moments: Mapping[str, float], seeds: Tensor) -> Tensor:
        """(pairs,) bool: which are kept. The race is run by logarithms: far out, a weight is 0 in floating point."""
        # A share like 0.9 of 10 falls short of 9 by rounding.
        num_kept = max(1, math.floor(len(margins) * (1 - self.dropped_share) + 1e-9))
        times = torch.stack(
            [
                torch.empty((), dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(seed))
                for seed in seeds.tolist()
            ]
        )
        finish = times.log() + standardised(margins, moments).double().cpu() ** 2 / 2
        kept = torch.zeros(len(margins), dtype=torch.bool)
        kept[finish.topk(num_kept, largest=False).indices] = True
        return kept.to(margins.device)
