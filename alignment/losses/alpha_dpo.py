"""SimPO whose target margin follows how far each pair has moved from the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative, require, within
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput
from alignment.losses.dpo import log_ratios
from alignment.losses.running import NO_MOMENTS, moving_moments, standardised


@dataclass(kw_only=True)
class AlphaDPO(BetaPairLoss):
    """L = -log S(beta (a - b - t)), with t = gamma / beta + alpha (h - m) / s and h = r_w - r_l.

    a and b are the *mean* log-probs per token of the chosen and the rejected completion under the policy, r_w and r_l
    their *mean* log-ratios to the reference; S is the logistic function. The second hyper-parameter is the ratio
    gamma / beta, never gamma. t is the margin in nats per token that the loss asks for, without gradient: more of a
    pair that has moved further from the reference than others.

    m and s are moving averages of the mean and the standard deviation of h over a step's pairs: m <- decay m +
    (1 - decay) mean, from 0 and with this step before they are used. They are kept in checkpoints; outside training
    they stay as the last step left them.

    Paper: Wu et al. 2024, arXiv:2410.10148.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = beta S(-beta (a - b - t)) / n_w, G_l the same over n_l, with n_w and n_l the completions' lengths.

    Rewards: beta (a - alpha r_w) and beta (b - alpha r_l), as in the authors' code. Parts: `margin` is t.

    Recommended (the authors' recipes, beta, ratio, alpha, learning rate): Llama 3 instruct 2.5, 0.6, 0.2, 1e-6, and 10,
    0.4, 0.2, 1e-6 on SimPO's second data set; Mistral instruct 2.5, 0.15, 0.05, 6e-7; Gemma 2 instruct 10, 0.4, 0.05,
    8e-7. Decay 0.9.

    Deviations: the authors' code takes micro-batches for batches and updates m and s in evaluations too; where all h
    are equal, as at the very start, it divides 0 by 0, and here t is gamma / beta. Where rounding makes them differ
    there, as on a GPU, both blow it up: the first step's t is noise. The averages start at 0 without a
    correction for it, as in that code: in the first steps m and s are far below those of h, and t is up to ten times as
    wide as later. Its label smoothing, off by default, is left out. TRL has no such loss.
    """

    name: ClassVar[str] = "alpha_dpo"
    title: ClassVar[str] = "alpha-DPO"
    purpose: ClassVar[str] = "SimPO with a target margin per pair, from its log-ratios"
    uncertain: ClassVar[str] = "whether the paper too has the standardised margin times beta, like its authors' code"
    needs_reference: ClassVar[bool] = True
    min_items: ClassVar[int] = 2
    whole_step: ClassVar[bool] = True

    gamma_beta_ratio: float
    alpha: float
    decay: float

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.gamma_beta_ratio", self.gamma_beta_ratio)
        require(0 < self.alpha < 1, f"loss.alpha must be in (0, 1), not {self.alpha}; at 0 this is loss=simpo.")
        within("loss.decay", self.decay, "[0, 1)")

    def initial_state(self) -> dict[str, float]:
        """No step seen."""
        return dict(NO_MOMENTS)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta (a - alpha r_w) and beta (b - alpha r_l) (2 * pairs,); part `margin`."""
        means, ratios = inputs.policy.means(), log_ratios(inputs).means()
        shifts = ratios[0::2] - ratios[1::2]
        state = dict(inputs.state)
        if inputs.seeds is not None:
            state = moving_moments(state, shifts, self.decay)
        margins = self.gamma_beta_ratio + self.alpha * standardised(shifts, state)
        losses = -F.logsigmoid(self.beta * (means[0::2] - means[1::2] - margins))
        rewards = self.beta * (means - self.alpha * ratios).detach()
        return LossOutput(losses, rewards, {"margin": margins}, state)

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + exp(beta (gamma / beta - a + b))) of the reference's own mean log-probs: every h is 0."""
        means = torch.stack([inputs.policy.sequence(i).double().mean() for i in range(len(inputs.policy))])
        excess = self.beta * (self.gamma_beta_ratio - means[0::2] + means[1::2])
        return torch.logaddexp(torch.zeros_like(excess), excess)
