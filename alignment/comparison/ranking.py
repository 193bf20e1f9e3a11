"""The variants in their order, and whether what lies between them is noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from alignment.comparison.measures import Measure, criterion
from alignment.comparison.members import Member, Variant, differing, once, variants
from alignment.comparison.statistics import Difference, holm, paired_difference, unpaired_difference
from alignment.run_folder import wilson_interval


@dataclass(frozen=True, slots=True)
class Against:
    """The best variant against another one.

    Attributes:
        p: of `difference`, adjusted for the number of comparisons.
        seeds_overlap: some seed of the other does at least as well as some seed of the best.
    """

    other: Variant
    difference: Difference
    p: float | None
    seeds_overlap: bool


@dataclass(slots=True)
class Comparison:
    """The members with what was found of them.

    Attributes:
        copies: what was left out since it is the same run as a member, with the member's name.
        rank_by: what variants are ranked by; None where nothing of it is known.
        ranked: the variants that have it, the best first.
        best: of each loss, the best first; with one loss only, all its variants.
        against: the best of all against each other of `best`.
    """

    members: list[Member]
    copies: dict[str, str]
    variants: list[Variant]
    differing: list[str]
    rank_by: Measure | None = None
    ranked: list[Variant] = field(default_factory=list)
    best: list[Variant] = field(default_factory=list)
    against: list[Against] = field(default_factory=list)


def compare(members: Sequence[Member]) -> Comparison:
    """Rank the variants, and ask of the differences between the best whether they are noise."""
    members, copies = once(members)
    found = Comparison(members, copies, variants(members), differing([m for m in members if m.loss]))
    found.rank_by = measure = criterion(found.variants)
    if measure is None:
        return found
    means = {id(variant): measure.mean(variant) for variant in found.variants}
    known = [variant for variant in found.variants if means[id(variant)] is not None]
    found.ranked = sorted(known, key=lambda variant: -(means[id(variant)] or 0.0))
    several = len({variant.loss for variant in found.ranked}) > 1
    losses: set[str] = set()
    for variant in found.ranked:
        if not several or variant.loss not in losses:
            found.best.append(variant)
        losses.add(variant.loss)
    top = found.best[0]
    pairs = [(other, _difference(measure, top, other)) for other in found.best[1:]]
    adjusted = iter(holm([d.p for _, d in pairs if d is not None and d.p is not None]))
    worst = min(measure.values(top))
    found.against = [
        Against(other, d, None if d.p is None else next(adjusted), max(measure.values(other)) >= worst)
        for other, d in pairs
        if d is not None
    ]
    return found


def _difference(measure: Measure, a: Variant, b: Variant) -> Difference | None:
    paired = paired_difference(measure.by_item(a), measure.by_item(b))
    num_a, num_b = measure.num_items(a), measure.num_items(b)
    mean_a, mean_b = measure.mean(a), measure.mean(b)
    if paired is not None or mean_a is None or mean_b is None or not (num_a and num_b):
        return paired
    return unpaired_difference(mean_a, num_a, mean_b, num_b)


def interval(measure: Measure, variant: Variant) -> tuple[float, float] | None:
    """95% of a share, among as many items as were asked: another seed asks the same ones."""
    mean, count = measure.mean(variant), measure.num_items(variant)
    return wilson_interval(mean, count) if mean is not None and 0 <= mean <= 1 and count else None
