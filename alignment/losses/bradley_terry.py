"""The Bradley-Terry loss of reward models, with a margin and a term that centres the rewards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative
from alignment.losses.base import Loss, LossInputs, LossOutput, Requirements, given


@dataclass(kw_only=True)
class BradleyTerry(Loss):
    """L = -log S(r_w - r_l - m) + c (r_w + r_l)^2, with m = margin (s_w - s_l).

    r_w and r_l are the rewards of the chosen and the rejected completion: numbers of a linear head on the last hidden
    state, where a completion ends. So what trains is no policy but a reward model. S is the logistic function, s_w and
    s_l are the data's scores of the two, c is `centring`. The first term fixes differences of rewards alone; the second
    puts their mean at 0, so that rewards of different prompts can be compared.

    Papers: Ouyang et al. 2022, arXiv:2203.02155, Eq. 1, for two answers. The margin: Touvron et al. 2023 (Llama 2),
    arXiv:2307.09288, Eq. 2. The centring: Eisenstein et al. 2023, arXiv:2312.09244, Eq. 2.

    Gradient of -L by the rewards: by r_w it is S(m - r_w + r_l) - 2 c (r_w + r_l), by r_l it is -S(m - r_w + r_l) -
    2 c (r_w + r_l).

    Rewards: r_w and r_l. Parts: `centring` is (r_w + r_l)^2; `margin` is m, where the margin is not 0.

    Recommended: centring 0.01; no margin, because few data have scores. Llama 2 has margins of 0 to 1 or of 0 to 3 for
    its four grades of preference.

    Deviations: Llama 2 tabulates the margin by grade; here it is proportional to the gap of the scores, and the grades
    are scores. Ouyang et al. take the mean over all pairs of a ranking: `data.list_pairs=all_pairs` makes the pairs of
    a list, of which each counts as much. TRL's RewardTrainer has the same loss, with c 0 unless set.
    """

    name: ClassVar[str] = "bradley_terry"
    title: ClassVar[str] = "Bradley-Terry"
    purpose: ClassVar[str] = "trains a reward model, which judges answers"
    unit: ClassVar[str] = "pair"
    needs_reference: ClassVar[bool] = False
    reads_rewards: ClassVar[bool] = True

    centring: float
    margin: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("centring", "margin"):
            not_negative(f"loss.{key}", getattr(self, key))

    def requirements(self) -> Requirements:
        """Scores only for a margin."""
        return replace(super().requirements(), scores=self.margin > 0)

    def problem(self, completions: int, scores: tuple[float, ...] | None) -> str | None:
        """A margin is how much better the chosen completion is."""
        if self.margin and scores is not None and scores[0] < scores[1]:
            return f"scores its chosen completion {scores[1] - scores[0]:g} lower than its rejected one"
        return None

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards (2 * pairs,); parts `centring` and `margin` (pairs,)."""
        rewards = inputs.policy.sums()  # of one number each
        gaps = rewards[0::2] - rewards[1::2]
        sums = (rewards[0::2] + rewards[1::2]) ** 2
        parts = {"centring": sums.detach()}
        if self.margin:
            parts["margin"] = self._margins(inputs).to(rewards.dtype)
            gaps = gaps - parts["margin"]
        return LossOutput(-F.logsigmoid(gaps) + self.centring * sums, rewards.detach(), parts)

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + exp(m - r_w + r_l)) + c (r_w + r_l)^2 of the rewards with which the head starts."""
        chosen, rejected = inputs.policy.sums().view(-1, 2).double().unbind(1)
        margins = self._margins(inputs) if self.margin else torch.zeros_like(chosen)
        zero = torch.zeros_like(chosen)
        return torch.logaddexp(zero, margins - chosen + rejected) + self.centring * (chosen + rejected).square()

    def _margins(self, inputs: LossInputs) -> Tensor:
        """(pairs,) float64."""
        scores = given(inputs.scores, "LossInputs.scores")
        return self.margin * (scores[0::2] - scores[1::2])
