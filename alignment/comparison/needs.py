"""What it would take to tell two variants apart: held-out items, or seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, log10
from statistics import fmean, stdev
from typing import Any

from alignment.comparison.measures import Measure
from alignment.comparison.members import Variant
from alignment.comparison.ranking import Contrast, Standing
from alignment.comparison.statistics import Difference
from alignment.evaluation.statistics.power import LEVEL, POWER, items_for_mean, items_needed, seeds_needed
from alignment.runs.text import DASH, points

_HOPELESS = 100
"""Times the items at hand. A difference that needs more is below 0.28 of its standard error: its size says nothing."""


@dataclass(frozen=True, slots=True)
class Need:
    """What would tell the best variant from another one, if their true difference is the one observed.

    Attributes:
        items, seeds: how many in all; infinity where no number helps, and None for seeds whose spread is not known.
        items_here, seeds_here: how many there are; seeds that both variants have.
        tests: among how many comparisons the level is shared.
    """

    items: float
    items_here: int
    seeds: float | None
    seeds_here: int
    tests: int

    @property
    def is_hopeless(self) -> bool:
        """Whether the difference is too small for any number of items that one could have."""
        return self.items > _HOPELESS * self.items_here

    @property
    def lacks_items(self) -> bool:
        """Whether there are too few items."""
        return self.items > self.items_here

    @property
    def lacks_seeds(self) -> bool:
        """Whether there are too few seeds, as far as one knows."""
        return self.seeds is not None and self.seeds > self.seeds_here


def need_of(standing: Standing, contrast: Contrast) -> Need | None:
    """What would tell a contrast's variants apart; None if they are told apart.

    The level is 5%, shared among the contrasts that are not told yet: Holm's adjustment asks that of each of them.
    """
    if contrast.is_told:
        return None
    top, tests = standing.best[0], sum(not other.is_told for other in standing.contrasts)
    d, level = contrast.difference, LEVEL / tests
    by_seed = _by_seed(standing.measure, top, contrast.other)
    seeds = seeds_needed(fmean(by_seed), stdev(by_seed), level) if len(by_seed) > 1 else None
    items = float(d.count) if contrast.is_told_by_items else max(d.count + 1.0, _items(d, level))
    return Need(items, d.count, seeds, len(by_seed), tests)


def _items(d: Difference, level: float) -> float:
    """By the shares and the variance with the two items that the interval adds, one for each side."""
    if d.better is None or d.worse is None:
        return items_for_mean(d.value, d.variance, level)
    n = d.count + 2
    return items_needed((d.better + 1) / n, (d.worse + 1) / n, d.value * d.count / n, d.variance, level)


def _by_seed(measure: Measure, a: Variant, b: Variant) -> list[float]:
    """The difference of the two for each seed that both have."""
    of_a, of_b = _values(measure, a), _values(measure, b)
    return [of_a[seed] - of_b[seed] for seed in of_a if seed in of_b]


def _values(measure: Measure, variant: Variant) -> Mapping[Any, float]:
    found: dict[Any, list[float]] = {}
    for member in variant.members:
        if (value := measure.value(member)) is not None:
            found.setdefault(member.seed, []).append(value)
    return {seed: fmean(values) for seed, values in found.items()}


def in_words(need: Need, difference: Difference, unit: str, again: bool = False) -> str:
    """One sentence: how many items and seeds it takes, and which of them binds.

    Args:
        again: after another such sentence, so that it need not repeat the terms.
    """
    if need.is_hopeless:
        around = (difference.high - difference.low) / 2
        return (
            f"No number of held-out {unit} would help a difference this small: it is {points(difference.value)} ± "
            f"{points(around)} points."
        )
    shared = f" shared by {need.tests} comparisons" if need.tests > 1 else ""
    terms = "" if again else f" (power {POWER:.0%}, two-sided {LEVEL:.0%}{shared})"
    items = f"{_items_in_words(need, unit)}, {_more(need):,} more than here"
    spread = f"by the spread of the {need.seeds_here} here"
    if need.lacks_items and need.lacks_seeds:
        assert need.seeds is not None
        binding = unit if need.items / need.items_here > need.seeds / need.seeds_here else "seeds"
        return (
            f"To tell a difference of this size takes {items}, and {_seeds_in_words(need)}, {spread}{terms}; the "
            f"{binding} bind more."
        )
    if need.lacks_seeds:
        return (
            f"The {unit} tell the two apart, and the seeds are what binds: {spread} it takes "
            f"{_seeds_in_words(need)}{terms}."
        )
    if need.seeds is not None:
        seeds = f"of seeds {need.seeds:.0f} would do, {spread}"
    else:
        why = "with one seed" if need.seeds_here else "without seeds in common"
        seeds = f"{why} nobody knows what other seeds would change"
    if not need.lacks_items:
        return f"The {unit} tell the two apart; {seeds}."
    said = f"To tell a difference of this size takes {items}{terms}"
    if need.seeds is not None:
        return f"{said}; the {unit} bind, and {seeds}."
    return f"{said}." if again else f"{said}; {seeds}."


def in_cell(need: Need, unit: str) -> str:
    """The numbers alone, for a table."""
    if need.is_hopeless:
        return "no number"
    items = [f"{_items_in_words(need, unit)}"] if need.lacks_items else []
    return "\n".join([*items, *([_seeds_in_words(need)] if need.lacks_seeds else [])]) or DASH


def _items_in_words(need: Need, unit: str) -> str:
    return f"about {_rounded(need.items):,} {unit}"


def _seeds_in_words(need: Need) -> str:
    assert need.seeds is not None
    return f"more than {_HOPELESS} seeds" if need.seeds > _HOPELESS else f"{need.seeds:.0f} seeds"


def _rounded(number: float) -> int:
    """Upwards to a whole number of two digits: a plan knows no more."""
    return ceil(number / _step(number)) * _step(number)


def _more(need: Need) -> int:
    """How many more than here, to the nearest number of two digits."""
    number = _rounded(need.items) - need.items_here
    return round(number / _step(number)) * _step(number)


def _step(number: float) -> int:
    return int(10 ** max(0, floor(log10(max(1, number))) - 1))
