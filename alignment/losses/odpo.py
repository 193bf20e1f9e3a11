"""DPO with an offset from scores: the clearer the preference, the larger the margin asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import positive
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, given
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class ODPO(BetaPairLoss):
    """L = -log S(beta (u - v) - D), with D = alpha log(s_w - s_l).

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, S is the logistic function, and s_w and s_l are the data's scores of the two. A score gap below 1
    gives a negative offset, so the unit of the scores matters: multiplying them by f adds alpha log f to the offset.

    A chosen completion with the lower score is refused. Two equal scores have the formula's limit, a loss of 0: such a
    pair prefers nothing.

    Paper: Amini, Vieira and Cotterell 2024, arXiv:2402.10571.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = G_l = beta S(D - beta (u - v)).

    Rewards: beta u and beta v. Parts: `offset` is D.

    Recommended (the authors' README, beta and alpha): 0.7, 0.5 for sentiment; 0.05, 1 for toxicity; 0.5, 1 for
    summarisation.

    Deviations: the authors order pairs by score and leave out equal scores when they read the data; their code gives
    NaN for a lower score of the chosen completion. Its option of a ratio of scores instead of the gap is left out. TRL
    has no such loss.
    """

    name: ClassVar[str] = "odpo"
    title: ClassVar[str] = "ODPO"
    purpose: ClassVar[str] = "for scored pairs: a clearer preference, a larger margin"
    needs_reference: ClassVar[bool] = True
    needs_scores: ClassVar[bool] = True

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.alpha", self.alpha)

    def problem(self, completions: int, scores: tuple[float, ...] | None) -> str | None:
        """The offset is a logarithm of the gap."""
        if scores is not None and scores[0] < scores[1]:
            return f"scores its chosen completion {scores[1] - scores[0]:g} lower than its rejected one"
        return None

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,); part `offset` (pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        offsets = self.alpha * _gaps(inputs).log().to(rewards.dtype)
        losses = -F.logsigmoid(rewards[0::2] - rewards[1::2] - offsets)
        return LossOutput(losses, rewards.detach(), {"offset": offsets})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + gap^alpha) for every pair."""
        return torch.log1p(_gaps(inputs) ** self.alpha)


def _gaps(inputs: LossInputs) -> Tensor:
    """(pairs,) float64: how much higher the chosen completion's score is."""
    scores = given(inputs.scores, "LossInputs.scores")
    gaps = scores[0::2] - scores[1::2]
    if not bool((gaps >= 0).all()):
        raise ValueError("ODPO needs chosen completions whose scores are not below those of the rejected ones.")
    return gaps
