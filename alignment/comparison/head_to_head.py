"""The answers of variants to the same prompts, judged against each other instead of against a common third."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignment.comparison.measures import verdicts, wins
from alignment.comparison.members import Variant
from alignment.comparison.ranking import Comparison
from alignment.comparison.statistics import Difference, holm, paired_difference

MAX_ENTRANTS = 8
"""As many variants meet: a matrix of more is no longer read."""


@dataclass(frozen=True, slots=True)
class Duel:
    """One variant's answers against another's, prompt by prompt.

    Attributes:
        ahead: of the share of prompts that the first wins, ties as one half, over the share that the other wins.
        p: of `ahead`, adjusted for the number of duels.
    """

    ahead: Difference
    p: float

    @property
    def rate(self) -> float:
        """Share of prompts that the first wins, ties as one half."""
        return 0.5 + self.ahead.value / 2

    @property
    def bounds(self) -> tuple[float, float]:
        """Its 95% interval."""
        return max(0.0, 0.5 + self.ahead.low / 2), min(1.0, 0.5 + self.ahead.high / 2)

    @property
    def is_noise(self) -> bool:
        """One of the two tests cannot tell it from a draw."""
        return self.ahead.is_noise or self.p > 0.05


def entrants(found: Comparison) -> list[Variant]:
    """Those with verdicts among all variants, or where these are too many, among the best of each loss."""
    several = found.ranked if len(found.ranked) <= MAX_ENTRANTS else found.best[:MAX_ENTRANTS]
    return [variant for variant in several if any(verdicts(member) for member in variant.members)]


def duels(variants: Sequence[Variant]) -> dict[tuple[int, int], Duel]:
    """Of each variant against each later one, by their places."""
    found = {}
    for i, a in enumerate(variants):
        for j, b in enumerate(variants[i + 1 :], i + 1):
            won = _wins(a, b)
            ahead = paired_difference(won, {prompt: 1 - share for prompt, share in won.items()})
            if ahead is not None and ahead.p is not None:
                found[i, j] = ahead
    adjusted = holm([ahead.p or 0.0 for ahead in found.values()])
    return {places: Duel(ahead, p) for (places, ahead), p in zip(found.items(), adjusted, strict=True)}


def _wins(a: Variant, b: Variant) -> dict[str, float]:
    """Share of wins by prompt, over every member of the one against every member of the other."""
    each = [wins(first, second) for first in _judged(a) for second in _judged(b)]
    shared = set.intersection(*(set(won) for won in each)) if each else set()
    return {prompt: sum(won[prompt] for won in each) / len(each) for prompt in shared}


def _judged(variant: Variant) -> list[dict]:
    return [found for member in variant.members if (found := verdicts(member))]
