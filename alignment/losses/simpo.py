"""Simple preference optimisation: length-normalised, without a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput


@dataclass(kw_only=True)
class SimPO(BetaPairLoss):
    """L = -log S(beta (a - b) - gamma), with gamma = beta * gamma_beta_ratio.

    a and b are the *mean* log-probs per token of the chosen and the rejected completion under the policy; there is no
    reference. S is the logistic function. The second hyper-parameter is the ratio gamma / beta, never gamma: the
    ratio is the margin in nats per token that the loss asks for, and keeps its meaning when beta is tuned.

    Paper: Meng, Xia and Chen 2024, arXiv:2405.14734, Eq. 6.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = beta S(gamma - beta (a - b)) / n_w, G_l the same over n_l, with n_w and n_l the completions' lengths.

    Rewards: beta a and beta b.

    Recommended (the authors' README, beta and ratio): Mistral base 2.0, 0.8; Mistral instruct 2.5, 0.1; Llama 3 base
    2.0, 0.5; Llama 3 instruct 2.5, 0.55, and 10, 0.3 on its second data set; Gemma 2 instruct 10, 0.5. They tune the
    learning rate first, then the ratio in [0, 1].

    Deviations: the authors' code offers label smoothing, a hinge and an SFT term, all off by default; they are left
    out. TRL (`CPOTrainer`, `simpo`) takes gamma and divides by beta, and adds an NLL term unless `cpo_alpha` is 0: its
    defaults amount to a ratio of 5.
    """

    name: ClassVar[str] = "simpo"
    title: ClassVar[str] = "SimPO"
    purpose: ClassVar[str] = "compares rewards per token and asks for a target margin"
    needs_reference: ClassVar[bool] = False

    gamma_beta_ratio: float

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.gamma_beta_ratio", self.gamma_beta_ratio)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta a and beta b (2 * pairs,)."""
        rewards = self.beta * inputs.policy.means()
        margins = rewards[0::2] - rewards[1::2] - self.beta * self.gamma_beta_ratio
        return LossOutput(-F.logsigmoid(margins), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + exp(beta (gamma / beta - a + b))) of the reference's own mean log-probs."""
        means = torch.stack([inputs.policy.sequence(i).double().mean() for i in range(len(inputs.policy))])
        excess = self.beta * (self.gamma_beta_ratio - means[0::2] + means[1::2])
        return torch.logaddexp(torch.zeros_like(excess), excess)
