"""The policy's implicit reward as judge: how much likelier an answer has become than the reference makes it.

The log-ratio log pi(y|x) - log ref(y|x) is DPO's reward without beta (Rafailov et al. 2023, arXiv 2305.18290, equation
5). Its sum over the tokens grows with the length of an answer, its mean does not; RewardBench scores policies by the
sum (Lambert et al. 2024, arXiv 2403.13787), and DICE trains a policy by its own (Chen et al. 2024, arXiv 2406.09760).
The tokens are those of the item's group, never tokenised anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from alignment.evaluation.judges.base import Item, Judge, Judgement
from alignment.evaluation.judges.store import JudgementStore
from alignment.types import Group, RaggedLogps

Logps = Callable[[Sequence[Group]], RaggedLogps]
"""The log-probs of a policy for all completions of groups, end to end in their order."""


def implicit_rewards(policy: RaggedLogps, reference: RaggedLogps, mean: bool) -> Tensor:
    """(S,) float64 log-ratios of S completions in nats: summed over their tokens, or the mean of these.

    Raises:
        ValueError: the two have other tokens.
    """
    if not policy.lengths.equal(reference.lengths):
        raise ValueError("The log-probs of policy and reference are not those of the same tokens.")
    ratios = RaggedLogps(policy.values.detach().double() - reference.values.detach().double(), policy.offsets)
    return ratios.means() if mean else ratios.sums()


class ImplicitJudge(Judge):
    """Scores answers by the log-ratio of a policy and its reference.

    Args:
        policy, reference: their log-probs.
        identities: of the two, as `alignment.policy.identity` makes them.
        mean: per token, in place of the sum.
        cache: the folder in which scores are kept.
    """

    kind: ClassVar[str] = "implicit"

    def __init__(self, policy: Logps, reference: Logps, identities: tuple[str, str], mean: bool, cache: Path) -> None:
        self._policy, self._reference = policy, reference
        self._identities = identities
        self._mean = mean
        self._cache = cache

    def description(self) -> dict[str, Any]:
        """Both policies, and how tokens are reduced."""
        policy, reference = self._identities
        return {"version": 1, "policy": policy, "reference": reference, "reduction": "mean" if self._mean else "sum"}

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        """The reward of each answer, nats.

        Raises:
            ValueError: an item without tokens.
        """
        if any(item.group is None for item in items):
            raise ValueError("The implicit reward is one of tokens: give items with a group.")
        with JudgementStore(self._cache, self) as store:
            found = store.replies(items, self._asked, tokens=True)
        return [Judgement(one, reasons=() if one is not None else ("it is not finite",)) for one in found]

    def _asked(self, items: Sequence[Item]) -> Iterator[tuple[int, float | None]]:
        groups = [item.group for item in items if item.group is not None]
        rewards = implicit_rewards(self._policy(groups), self._reference(groups), self._mean)
        for place, value in enumerate(rewards.tolist()):
            yield place, value if math.isfinite(value) else None
