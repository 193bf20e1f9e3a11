"""DPO with length-normalised log-ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, per_pair
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class LNDPO(BetaPairLoss):
    """L = -log S(beta (r_w - r_l)), with r the *mean* log-ratio per token of a completion.

    The log-ratio is log pi(y|x) - log pi_ref(y|x) and S is the logistic function. beta is a reward per nat and token:
    the same strength needs a larger one than DPO's.

    Papers: the length-normalised DPO of Meng et al. 2024, arXiv:2405.14734, and of Lambert et al. 2024 (Tulu 3),
    arXiv:2411.15124.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = beta S(-beta (r_w -
    r_l)) / n_w, G_l the same over n_l.

    Rewards: beta r_w and beta r_l.

    Recommended: beta 5 (Tulu 3).

    Deviations: none. TRL's `sigmoid_norm` is the same and logs beta times the sums.
    """

    name: ClassVar[str] = "ln_dpo"
    title: ClassVar[str] = "LN-DPO"
    purpose: ClassVar[str] = "DPO per token: long answers carry no larger rewards"
    needs_reference: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta r_w and beta r_l (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).means()
        return LossOutput(-F.logsigmoid(rewards[0::2] - rewards[1::2]), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair."""
        return per_pair(inputs.policy, math.log(2))
