"""Direct preference optimisation, and the log-ratios that every loss with a reference starts from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.errors import within
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput, given, per_pair
from alignment.types import RaggedLogps


def log_ratios(inputs: LossInputs) -> RaggedLogps:
    """log(pi / pi_ref) per completion token, in nats, ragged like the policy's log-probs.

    The difference is taken per token: a float32 sum of some hundred nats is rounded as coarsely as an early log-ratio
    of the whole sequence is large.
    """
    reference = given(inputs.reference, "LossInputs.reference")
    return RaggedLogps(inputs.policy.values - reference.values, inputs.policy.offsets)


@dataclass(kw_only=True)
class DPO(BetaPairLoss):
    """L = -(1 - e) log S(beta d) - e log S(-beta d), with d = u - v; e = 0 is DPO, e > 0 is conservative DPO.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens; S is the logistic function and e is `label_smoothing`, the assumed rate of swapped labels.

    Papers: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7. Conservative DPO: Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO".

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_w = G_l = beta (S(-beta d) - e). It turns negative beyond beta d = log((1 - e) / e): a larger margin is pulled
    back.

    Rewards: beta u and beta v.

    Recommended: beta 0.1 (the paper; 0.5 for its summarisation task), 0.01 to 0.1 in later searches; e 0, and 0.1 is
    the note's suggestion for noisy labels.

    Deviations: none from the authors' code. TRL's `sigmoid` loss is the same for e = 0; since 0.29 it ignores its
    `label_smoothing`, so it has no conservative DPO.
    """

    name: ClassVar[str] = "dpo"
    title: ClassVar[str] = "DPO"
    purpose: ClassVar[str] = "the usual choice; label smoothing if labels may be wrong"
    needs_reference: ClassVar[bool] = True

    label_smoothing: float

    def __post_init__(self) -> None:
        super().__post_init__()
        within("loss.label_smoothing", self.label_smoothing, "[0, 0.5)")

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        margins = rewards[0::2] - rewards[1::2]
        losses = -(1 - self.label_smoothing) * F.logsigmoid(margins) - self.label_smoothing * F.logsigmoid(-margins)
        return LossOutput(losses, rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every pair, with and without label smoothing."""
        return per_pair(inputs.policy, math.log(2))
