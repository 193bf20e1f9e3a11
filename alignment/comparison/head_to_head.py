"""Head-to-head win rates: a judge compares the answers of two variants directly, not by way of a third model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from alignment.comparison.measures import mean_by_item, verdicts, wins
from alignment.comparison.members import ComparedRun, Variant
from alignment.comparison.ranking import Comparison
from alignment.comparison.statistics import Difference, holm, paired_difference

MAX_ENTRANTS = 8
"""Variants that meet each other; nobody reads a larger matrix."""


@dataclass(frozen=True, slots=True)
class Duel:
    """The answers of two variants compared prompt by prompt.

    Attributes:
        ahead: share of prompts that the first wins minus the share that the second wins; a tie is half a win.
        p: p value of `ahead`, adjusted for the number of duels.
    """

    ahead: Difference
    p: float

    @property
    def rate(self) -> float:
        """Win rate of the first; a tie is half a win."""
        return 0.5 + self.ahead.value / 2

    @property
    def bounds(self) -> tuple[float, float]:
        """95% interval of the win rate."""
        return max(0.0, 0.5 + self.ahead.low / 2), min(1.0, 0.5 + self.ahead.high / 2)

    @property
    def is_noise(self) -> bool:
        """Whether the interval or the test leaves a draw possible."""
        return self.ahead.is_noise or self.p > 0.05


Meeting = Callable[[ComparedRun, ComparedRun], Mapping[str, float]]
"""The first run's share of wins over the second by prompt; empty where their answers were not compared."""


def by_score(first: ComparedRun, second: ComparedRun) -> Mapping[str, float]:
    """By the scores that the runs' own judge gave to their answers."""
    return wins(verdicts(first), verdicts(second))


def entrants(found: Comparison, meet: Meeting = by_score) -> list[Variant]:
    """The variants that have met another one: of all, or if these are too many, of the best of each loss."""
    several = found.ranked if len(found.ranked) <= MAX_ENTRANTS else found.best[:MAX_ENTRANTS]
    return [variant for variant in several if any(_wins(variant, o, meet) for o in several if o is not variant)]


def duels(variants: Sequence[Variant], meet: Meeting = by_score) -> dict[tuple[int, int], Duel]:
    """The duel of each variant with each later one, by their indices."""
    found = {}
    for i, a in enumerate(variants):
        for j, b in enumerate(variants[i + 1 :], i + 1):
            won = _wins(a, b, meet)
            ahead = paired_difference(won, {prompt: 1 - share for prompt, share in won.items()})
            if ahead is not None and ahead.p is not None:
                found[i, j] = ahead
    adjusted = holm([ahead.p or 0.0 for ahead in found.values()])
    return {indices: Duel(ahead, p) for (indices, ahead), p in zip(found.items(), adjusted, strict=True)}


def _wins(a: Variant, b: Variant, meet: Meeting) -> Mapping[str, float]:
    """a's share of wins by prompt, over every pairing of a run of a with a run of b that has met it."""
    met = [shares for first in a.members for second in b.members if (shares := meet(first, second))]
    return mean_by_item(met) if met else {}
