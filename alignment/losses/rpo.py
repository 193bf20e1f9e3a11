"""Regularised preference optimisation: DPO with an NLL term."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.errors import positive
from alignment.losses.base import BetaPairLoss, LossInputs, LossOutput
from alignment.losses.dpo import log_ratios
from alignment.losses.nll import Anchored, NLLReduction, NLLScope


@dataclass(kw_only=True)
class RPO(Anchored, BetaPairLoss):
    """L = -log S(beta (u - v)) + alpha NLL.

    u and v are the log-ratios log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected completion, *summed* over
    their tokens, and S is the logistic function. NLL is the negative log-likelihood of the chosen completion under the
    policy, its summed log-prob times -k, with k by `nll_reduction`: sequence_mean 1 / n_w with n_w the completion's
    length, so the *mean* over its own tokens; token_mean pairs of the step / chosen tokens of the step; sequence_sum 1.
    With `nll_scope` prompt_and_response the prompt's tokens join it.

    Papers: two methods with one formula. Pang et al. 2024 (iterative reasoning preference optimisation),
    arXiv:2404.19733, third version; Liu et al. 2024 (regularized preference optimization), arXiv:2405.16436.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l:
    G_l = beta S(-beta (u - v)), G_w = G_l + alpha k.

    Rewards: beta u and beta v. Parts: `nll` is the NLL.

    Recommended: beta 0.1, alpha 1, sequence_mean, learning rate 7e-7 (iterative reasoning preference optimisation);
    beta 0.01, alpha 0.005, learning rate 5e-7 (Liu et al.).

    Deviations: none from Pang et al., whose first version weighted the DPO term with alpha instead. TRL builds it from
    its losses `sigmoid` and `sft`, whose NLL is token_mean over one micro-batch; until 0.28 it had `rpo_alpha`, whose
    NLL left out real tokens of id 0.
    """

    name: ClassVar[str] = "rpo"
    title: ClassVar[str] = "RPO"
    purpose: ClassVar[str] = "DPO that keeps the chosen answer likely, mostly for reasoning"
    uncertain: ClassVar[str] = "how the NLL of arXiv:2405.16436 is normalised"
    needs_reference: ClassVar[bool] = True

    alpha: float
    nll_reduction: NLLReduction
    nll_scope: NLLScope

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.alpha", self.alpha)

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,), rewards beta u and beta v (2 * pairs,); part `nll` (pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        nll = self.nll(inputs)
        losses = self.alpha * nll - F.logsigmoid(rewards[0::2] - rewards[1::2])
        return LossOutput(losses, rewards.detach(), {"nll": nll.detach()})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """log 2 + alpha NLL of the reference's own log-probs."""
        return math.log(2) + self.alpha * self.nll_by_hand(inputs)
