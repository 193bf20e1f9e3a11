"""DPO for more than two completions by the Plackett-Luce model: of the whole ranking, and of its first place only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import LossInputs, LossOutput
from alignment.losses.lists import BetaListLoss, better_pairs, lowest, members, sizes_of, table


@dataclass(kw_only=True)
class PlackettLuce(BetaListLoss):
    """L = -sum_k log(e^r_k / sum_{j >= k} e^r_j), with r = beta u and the K completions of a list in order, best first.

    u is the log-ratio log pi(y|x) - log pi_ref(y|x) of a completion, *summed* over its tokens. The ranking is drawn
    place by place, each time the best of those that are left; the last place is certain. With two completions it is
    `dpo`.

    Paper: Rafailov et al. 2023, arXiv:2305.18290, appendix A.3.

    Gradient of -L per token of completion i: G_i = beta (1 - sum_{k <= i} p_k(i)), with p_k(i) = e^r_i / sum_{j >= k}
    e^r_j; positive for the first, negative for the last, of either sign between them.

    Rewards: r. Each term is computed as -log S(r_k - log sum_{j > k} e^r_j).

    Recommended: beta 0.1, as for pairs; the paper runs no lists.

    Deviations: none. Completions with equal scores keep the order of the file: the model knows no ties. The authors'
    code and TRL have pairs only.
    """

    name: ClassVar[str] = "plackett_luce"
    title: ClassVar[str] = "Plackett-Luce"
    purpose: ClassVar[str] = "DPO on whole rankings of several answers"
    orders_ties: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (lists,), rewards beta u (S,)."""
        sizes = sizes_of(inputs)
        rewards = self.rewards(inputs)
        by_list = table(rewards, sizes)
        rest = by_list[:, None].masked_fill(~better_pairs(sizes), lowest(rewards.dtype)).logsumexp(2)
        return LossOutput(-F.logsigmoid(by_list - rest).sum(1), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log K!: all K! rankings are equally likely."""
        return torch.lgamma(sizes_of(inputs).double() + 1)


@dataclass(kw_only=True)
class BestVsRest(BetaListLoss):
    """L = -log(e^r_1 / sum_j e^r_j), with r = beta u: the best completion of a list against all others at once.

    u is the log-ratio log pi(y|x) - log pi_ref(y|x) of a completion, *summed* over its tokens. It is the first term of
    `plackett_luce`: the order of the others does not matter, and the likeliest of them is lowered most. With two
    completions it is `dpo`.

    Paper: Chen et al. 2024 (Softmax-DPO), arXiv:2406.09215, with one preferred and several other items.

    Gradient of -L per token of completion i: with p = softmax(r), G_1 = beta (1 - p_1) for the best, -beta p_i for the
    others.

    Rewards: r. Computed as -log S(r_1 - log sum_{j > 1} e^r_j).

    Recommended: beta 0.1 (the authors' script).

    Deviations: none in the formula. The authors' code sums the exponentials themselves, which overflow in float32 where
    a difference of rewards exceeds 88. TRL has pairs only.
    """

    name: ClassVar[str] = "best_vs_rest"
    title: ClassVar[str] = "best-vs-rest"
    purpose: ClassVar[str] = "DPO of one good answer against several bad ones"
    orders_ties: ClassVar[bool] = True

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (lists,), rewards beta u (S,)."""
        sizes = sizes_of(inputs)
        rewards = self.rewards(inputs)
        by_list = table(rewards, sizes)
        rest = by_list.masked_fill(~members(sizes), lowest(rewards.dtype))[:, 1:].logsumexp(1)
        return LossOutput(-F.logsigmoid(by_list[:, 0] - rest), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log K."""
        return sizes_of(inputs).double().log()
