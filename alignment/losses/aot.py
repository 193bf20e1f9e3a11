"""Alignment by optimal transport: distributions of margins or rewards are compared, quantile by quantile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import LossInputs, LossOutput, given
from alignment.losses.dpo import DPO, log_ratios


def _ranks(values: Tensor) -> Tensor:
    """(n,) int64: how many values are smaller; equal ones are counted in the order that they stand in."""
    return values.argsort(stable=True).argsort()


@dataclass(kw_only=True)
class AOT(DPO):
    """L = -(1 - e) log S(z_i) - e log S(-z_i), with z_i = beta (M_i - R_(k)) and k the rank of M_i in the step.

    M_i = log pi(y_w|x) - log pi(y_l|x) is pair i's margin under the policy, R_(k) the k-th smallest of the step's
    margins log pi_ref(y_w|x) - log pi_ref(y_l|x) under the reference; log-probs are *summed* over tokens. S is the
    logistic function, e is `label_smoothing`.

    A pair is not compared with itself under the reference (that is DPO) but quantile with quantile: the distribution of
    the policy's margins is to dominate the reference's. Sorting is the optimal transport between the two. The pairs of
    a whole optimizer step are sorted together; one pair alone gives DPO. In evaluation all held-out pairs are.

    Paper: Melnyk et al. 2024, arXiv:2406.05882, for paired data.

    Gradient of -L, per chosen token G_w and, with the opposite sign, per rejected token G_l of pair i:
    G_w = G_l = beta (S(-z_i) - e). The ranks have no derivative.

    Rewards: beta u and beta v, with u and v the log-ratios of the chosen and the rejected completion. Over the step
    their margins and the z_i have the same sum; pair by pair they differ.

    Recommended: beta 0.01, e 0, and a large step, since the quantiles are its own.

    Deviations: the authors' contribution to TRL sorts within one micro-batch of one process; here it is the whole step,
    however it is split. Otherwise TRL's `aot` is the same.
    """

    name: ClassVar[str] = "aot"
    title: ClassVar[str] = "AOT"
    purpose: ClassVar[str] = "the margins must beat the reference's as a distribution"
    uncertain: ClassVar[str] = "the paper's beta; smoothing is from TRL's code"
    whole_step: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,) in the order of the pairs, rewards beta u and beta v (2 * pairs,)."""
        ratios, reference = log_ratios(inputs).sums(), given(inputs.reference, "LossInputs.reference").sums()
        margins, before = ratios[0::2] - ratios[1::2], reference[0::2] - reference[1::2]
        # M_i - R_(k) = d_i + (R_i - R_(k)): where a pair meets itself, the exact per-token difference is all that is
        # left, and no rounded sum of hundreds of nats stands in the margin.
        counterparts = before.sort().values[_ranks((margins + before).detach())]
        z = self.beta * (margins + (before - counterparts))
        return LossOutput(_smoothed(z, self.label_smoothing), self.beta * ratios.detach())


@dataclass(kw_only=True)
class AOTUnpaired(DPO):
    """L = -(1 - e) log S(z_i) - e log S(-z_i), with z_i = beta (u_i - v_(k)) and k the rank of u_i in the step.

    u_i is the log-ratio log pi(y|x) - log pi_ref(y|x) of pair i's chosen completion, v_(k) the k-th smallest of the
    step's log-ratios of rejected completions; log-ratios are *summed* over tokens. S is the logistic function, e is
    `label_smoothing`.

    Chosen and rejected completions are not compared within their pair but quantile with quantile: the distribution of
    the chosen rewards is to dominate that of the rejected. Sorting is the optimal transport between the two. The
    completions of a whole optimizer step are sorted together; one pair alone gives DPO. In evaluation all held-out
    completions are.

    Paper: Melnyk et al. 2024, arXiv:2406.05882, for unpaired data.

    Gradient of -L, per chosen token G_w of pair i and, with the opposite sign, per rejected token G_l of the pair whose
    v has the same rank: G_w = G_l = beta (S(-z_i) - e). The ranks have no derivative.

    Rewards: beta u and beta v.

    Recommended: beta 0.01, e 0, and a large step, since the quantiles are its own.

    Deviations: it reads pairs, so that there are as many chosen as rejected completions, but not which belongs to
    which. The authors' contribution to TRL sorts within one micro-batch of one process; here it is the whole step,
    however it is split. Otherwise TRL's `aot_unpaired` (`aot_pair` in old versions) is the same.
    """

    name: ClassVar[str] = "aot_unpaired"
    title: ClassVar[str] = "AOT-unpaired"
    purpose: ClassVar[str] = "chosen rewards must beat rejected ones as a distribution"
    uncertain: ClassVar[str] = "the paper's beta; smoothing is from TRL's code"
    whole_step: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (pairs,) in the order of the chosen completions, rewards beta u and beta v (2 * pairs,)."""
        rewards = self.beta * log_ratios(inputs).sums()
        chosen, rejected = rewards[0::2], rewards[1::2]
        z = chosen - rejected.sort().values[_ranks(chosen.detach())]
        return LossOutput(_smoothed(z, self.label_smoothing), rewards.detach())


def _smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)
