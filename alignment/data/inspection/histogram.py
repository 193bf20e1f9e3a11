"""Lengths in numbers and bins, for tables and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BINS = 10


@dataclass(frozen=True, slots=True)
class Summary:
    """Lengths at a glance; quantiles are lengths that occur."""

    count: int
    least: int
    median: int
    mean: float
    q90: int
    q99: int
    most: int


@dataclass(frozen=True, slots=True)
class Bin:
    """How many lengths of each name are in [low, high); the last bin has no upper end."""

    low: int
    high: int | None
    counts: dict[str, int]

    @property
    def label(self) -> str:
        """The range, both ends included."""
        if self.high is None:
            return f"{self.low} or more"
        return f"{self.low}" if self.high == self.low + 1 else f"{self.low} to {self.high - 1}"


def quantile(lengths: Sequence[int], share: float) -> int:
    """The least length that at least this share of them do not exceed."""
    return sorted(lengths)[max(0, math.ceil(share * len(lengths)) - 1)]


def summary(lengths: Sequence[int]) -> Summary:
    """Of at least one length."""
    q50, q90, q99 = (quantile(lengths, share) for share in (0.5, 0.9, 0.99))
    return Summary(len(lengths), min(lengths), q50, sum(lengths) / len(lengths), q90, q99, max(lengths))


def histogram(lengths: Mapping[str, Sequence[int]]) -> list[Bin]:
    """The same bins for all names: round steps up to the length that 99 % do not exceed, and one for longer ones."""
    everything = [length for values in lengths.values() for length in values]
    if not everything:
        return []
    step = _round_up((quantile(everything, 0.99) + 1) / BINS)
    last = min(BINS, max(everything) // step)
    bins = []
    for number in range(min(everything) // step, last + 1):
        low = number * step
        high = low + step if number < last or max(everything) < low + step else None
        counts = {name: sum(low <= value < (high or math.inf) for value in values) for name, values in lengths.items()}
        bins.append(Bin(low, high, counts))
    return bins


def _round_up(width: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, ... that is not below the width."""
    power = 10 ** max(0, math.floor(math.log10(max(width, 1))))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= width)
