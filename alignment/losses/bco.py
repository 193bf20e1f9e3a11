"""Binary classifier optimisation: single completions with a label, against the running mean of all rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.errors import positive
from alignment.losses.base import Loss, LossInputs, LossOutput, Requirements, given
from alignment.losses.dpo import log_ratios
from alignment.losses.running import in_order


@dataclass(kw_only=True)
class BCO(Loss):
    """L = -log S(beta u - delta) for a desirable, w (-log S(delta - beta u)) for an undesirable row.

    u is the log-ratio log pi(y|x) - log pi_ref(y|x), *summed* over the completion's tokens; S is the logistic function.
    delta is the *mean* of beta u over the rows of all steps so far, of both labels and with this step's, without
    gradient. It is kept in checkpoints with the number of rows; outside training it stays as the last step left it.

    w is 1, or, with `density_weights`, an estimate of p(x | desirable) / p(x | undesirable) for the row's prompt x,
    clipped to [0.5, 10]: undesirable rows count as if their prompts were spread like those of the desirable ones. It
    comes from a classifier of the prompts (`alignment.training.prompt_density`) that is fitted once, before the first
    step, and is a factor of the row's loss in training, not in evaluation.

    Paper: Jung et al. 2024, arXiv:2404.04656, Eqs. 7 and 8 of its second version; the weights are in the first version
    only ("underlying distribution matching").

    Gradient of -L per token, upwards for a desirable (G_w), downwards for an undesirable row (G_l):
    G_w = beta S(delta - beta u), G_l = w beta S(beta u - delta).

    Rewards: beta u. Parts: `delta`, the same for every row.

    Recommended: beta 0.1, learning rate 5e-7 (the second version); 0.01 in TRL's recipe. Weights where desirable and
    undesirable completions answer unlike prompts; on pairs they are all 1. The authors even out unequal numbers of rows
    by repeating desirable ones.

    Deviations: the paper's delta is the mean of two means, one per label, each by an exponential moving average whose
    rate it does not give, and its L a sum of the two labels' means. The authors' code (in TRL until 2026) has the mean
    over all rows, like here; the two agree where a step has as many rows of either label. That code updates delta with
    every micro-batch, so that the first ones of a step see another delta than the last; here the step counts as a
    whole. It weights in evaluation too and draws the classifier's prompts with repetition. TRL 1.16 has only
    `bco_pair`, where delta is 0.
    """

    name: ClassVar[str] = "bco"
    title: ClassVar[str] = "BCO"
    purpose: ClassVar[str] = "judges rows against the mean reward so far; needs no pairs"
    uncertain: ClassVar[str] = "the rate of the paper's moving average of delta, which it does not give"
    unit: ClassVar[str] = "row"
    needs_reference: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True

    beta: float
    density_weights: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("loss.beta", self.beta)

    def requirements(self) -> Requirements:
        """Weights of the rows, where asked for."""
        return replace(super().requirements(), density_weights=self.density_weights)

    def initial_state(self) -> dict[str, float]:
        """No row seen."""
        return {"delta": 0.0, "count": 0.0}

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (rows,), rewards beta u (rows,); part `delta` (rows,)."""
        labels = given(inputs.labels, "LossInputs.labels")
        rewards = self.beta * log_ratios(inputs).sums()
        delta, count = inputs.state["delta"], inputs.state["count"]
        if inputs.seeds is not None:
            count += len(rewards)
            delta += len(rewards) / count * (in_order(rewards).mean().item() - delta)
        signs = rewards.new_tensor([-1.0, 1.0])[labels.long()]
        losses = -F.logsigmoid(signs * (rewards - delta))
        parts = {"delta": torch.full_like(rewards.detach(), delta)}
        return LossOutput(losses, rewards.detach(), parts, {"delta": delta, "count": count})

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every row: its reward and, before the first step, delta are 0."""
        return torch.full((len(inputs.policy),), math.log(2), dtype=torch.float64, device=inputs.policy.values.device)
