"""DPO that charges the chosen answer for its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.errors import not_negative
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput
from alignment.losses.dpo import log_ratios


@dataclass(kw_only=True)
class RDPO(BetaPairLoss):
    """L = -log S(beta d + alpha (n_w - n_l)), with n the lengths in tokens.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, d = u - v, and S is the logistic function.

    It follows from the reward r(x, y) - alpha n(y): a part alpha (n_w - n_l) of the preference is put down to the
    lengths, and the policy has to learn the rest.

    Paper: Park et al. 2024, arXiv:2403.19159.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l: G_w = G_l = beta S(-beta d
    - alpha (n_w - n_l)).

    Rewards: beta u + alpha n_w and beta v + alpha n_l.

    Recommended: beta 0.1, alpha 0.01 with lengths in tokens.

    Deviations: none. Where this loss is listed in papers and code of others the sign of alpha is sometimes a minus,
    which would reward length; the reward above gives the plus.
    """

    name: ClassVar[str] = "r_dpo"
    title: ClassVar[str] = "R-DPO"
    purpose: ClassVar[str] = "DPO with a price on length, against long-winded answers"
    needs_reference: ClassVar[bool] = True

    alpha: float

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.alpha", self.alpha)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u + alpha n_w and beta v + alpha n_l (2 * pairs,)."""
        ratios = log_ratios(inputs)
        rewards = self.beta * ratios.sums() + self.alpha * ratios.lengths.to(ratios.values.dtype)
        return LossOutput(-F.logsigmoid(rewards[0::2] - rewards[1::2]), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log(1 + exp(-alpha (n_w - n_l)))."""
        excess = self.alpha * inputs.policy.lengths.double()
        return F.softplus(excess[1::2] - excess[0::2])
