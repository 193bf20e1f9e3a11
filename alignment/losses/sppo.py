"""Self-play preference optimisation, with the winner taken for certain or with win rates from scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from alignment.errors import positive
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, given, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class SPPO(BetaPairLoss):
    """L = (u - 1 / (2 beta))^2 / 2 + (v + 1 / (2 beta))^2 / 2.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens.

    beta is the inverse of the paper's eta. The target 1 / (2 beta) is its (P - 1/2) / beta with a win rate P of 1.

    Paper: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with hard labels.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = 1 / (2 beta) - u,
    G_l = v + 1 / (2 beta).

    Rewards: beta u and beta v.

    Recommended: beta 1e-3, learning rate 5e-7 with RMSprop (the authors). The loss is then of the order of 1e5 and its
    gradient of 500: with the usual clipping of the gradient's norm every step is clipped.

    Deviations: none from the authors' code, which has the halves. TRL's `sppo_hard` has not, so it is twice this loss.
    """

    name: ClassVar[str] = "sppo"
    title: ClassVar[str] = "SPPO"
    purpose: ClassVar[str] = "fits each answer's log-ratio to a target from self-play"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        ratios = log_ratios(inputs).sums()
        target = 1 / (2 * self.beta)
        losses = (ratios[0::2] - target) ** 2 / 2 + (ratios[1::2] + target) ** 2 / 2
        return LossOutput(losses, self.beta * ratios.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """1 / (4 beta^2) for every pair."""
        return per_pair(inputs.policy, 0.25 / self.beta**2)


@dataclass(kw_only=True)
class SPPOSoft(BetaPairLoss):
    """L = (u - t)^2 / 2 + (v + t)^2 / 2, with t = (P - 1/2) / beta and P = S(f (s_w - s_l)).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, s_w and s_l are the data's scores of the two and S is the logistic function. P is the probability that
    the chosen one wins, by the Bradley-Terry model; f is `score_scale`, what turns a gap of scores into log-odds. Equal
    scores ask for the reference's own probabilities; P = 1 is `sppo`.

    beta is the inverse of the paper's eta.

    Paper: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = t - u, G_l = v + t.

    Rewards: beta u and beta v. Parts: `win_rate` is P.

    Recommended: beta 1e-3, learning rate 5e-7 with RMSprop (the authors). score_scale 1 for scores that are log-odds,
    such as those of PairRM, which the authors use, or of a reward model trained by the Bradley-Terry loss; for other
    scores such that a typical gap gives the win rate that it stands for. The loss is of the order of 1e5, as in `sppo`.

    Deviations: this is the authors' `sppo_single`. Their default, `sppo`, replaces P by the chosen and, in the other
    term, 1 - P by the rejected completion's mean win rate over all sampled answers to the prompt, itself included, of
    which a pair holds two. TRL has hard labels alone.
    """

    name: ClassVar[str] = "sppo_soft"
    title: ClassVar[str] = "SPPO-soft"
    purpose: ClassVar[str] = "for scored pairs: SPPO that fits win rates"
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    score_scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.score_scale", self.score_scale)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,); part `win_rate` (pairs,)."""
        ratios = log_ratios(inputs).sums()
        win_rates = torch.sigmoid(self._log_odds(inputs)).to(ratios.dtype)
        targets = (win_rates - 0.5) / self.beta
        losses = (ratios[0::2] - targets) ** 2 / 2 + (ratios[1::2] + targets) ** 2 / 2
        return LossOutput(losses, self.beta * ratios.detach(), {"win_rate": win_rates})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """((P - 1/2) / beta)^2, which is (tanh(log-odds / 2) / (2 beta))^2."""
        return (torch.tanh(self._log_odds(inputs) / 2) / (2 * self.beta)) ** 2

    def _log_odds(self, inputs: LossInputs) -> Tensor:
        """(pairs,) float64: of the chosen completion's win."""
        scores = given(inputs.scores, "LossInputs.scores")
        return self.score_scale * (scores[0::2] - scores[1::2])
