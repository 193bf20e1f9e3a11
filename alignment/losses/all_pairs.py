"""DPO on all pairs of a ranked list."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from alignment.losses.base import LossInputs, LossOutput
from alignment.losses.lists import BetaListLoss, better_pairs, sizes_of, table


@dataclass(kw_only=True)
class AllPairs(BetaListLoss):
    """L = -(1 / N) sum_{i better than j} log S(r_i - r_j), with r = beta u and N the number of such pairs in the list.

    u is the log-ratio log pi(y|x) - log pi_ref(y|x) of a completion, *summed* over its tokens; S is the logistic
    function. Completions with equal scores are no pair; a list without a pair has the loss 0. With two completions it
    is `dpo`.

    The *mean* over pairs gives every list the same weight, however long it is; as separate pairs
    (`data.list_pairs=all_pairs`) a list of 4 would count six times.

    Papers: the mean over all pairs of a ranking is that of reward models, Ouyang et al. 2022, arXiv:2203.02155, Eq. 1;
    with the rewards of DPO, Rafailov et al. 2023, arXiv:2305.18290.

    Gradient of -L per token of completion i: G_i = beta / N (sum over worse j of S(r_j - r_i) - sum over better j of
    S(r_i - r_j)).

    Rewards: r.

    Recommended: beta 0.1, as for pairs.

    Deviations: none. TRL has pairs only.
    """

    name: ClassVar[str] = "all_pairs"
    title: ClassVar[str] = "all-pairs"
    purpose: ClassVar[str] = "DPO on every pair of a list; each list counts once"

    def __call__(self, inputs: LossInputs, step_statistics: Tensor | None = None) -> LossOutput:
        """Losses (lists,), rewards beta u (S,)."""
        sizes = sizes_of(inputs)
        rewards = self.rewards(inputs)
        by_list = table(rewards, sizes)
        pairs = better_pairs(sizes, inputs.scores)
        losses = -F.logsigmoid(by_list[:, :, None] - by_list[:, None]) * pairs
        return LossOutput(losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1), rewards.detach())

    def at_reference(self, inputs: LossInputs) -> Tensor:
        """Log 2 for every list that has a pair."""
        return math.log(2) * better_pairs(sizes_of(inputs), inputs.scores).any(2).any(1).double()
