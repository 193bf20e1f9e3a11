"""The variants in their order, and whether their differences are noise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.comparison.between import Between
from alignment.comparison.measures import ACCURACY, Measure, ranking_measure
from alignment.comparison.members import (
    ComparedRun,
    Variant,
    differing_settings,
    make_comparable,
    variants,
    without_copies,
)
from alignment.comparison.statistics import Difference, holm, paired_difference, unpaired_difference
from alignment.evaluation.intervals import tango_interval
from alignment.runs.folder import submapping
from alignment.runs.text import format_value


@dataclass(frozen=True, slots=True)
class Contrast:
    """The best variant compared with another one.

    Attributes:
        p: p value of `difference`, adjusted for the number of contrasts; None if the two saw different items.
        seeds_overlap: whether some seed of the other does at least as well as some seed of the best.
    """

    other: Variant
    difference: Difference
    p: float | None
    seeds_overlap: bool

    @property
    def is_told_by_items(self) -> bool:
        """Whether the interval excludes zero and the test agrees."""
        return not self.difference.is_noise and (self.p is None or self.p <= 0.05)

    @property
    def is_told(self) -> bool:
        """Whether the items tell the two apart, and no seed speaks against it."""
        return self.is_told_by_items and not self.seeds_overlap


@dataclass(slots=True)
class Standing:
    """The variants ranked by a measure.

    Attributes:
        ranked: the variants that have the measure, the best first.
        best: the best variant of each loss, on-policy and offline apart, the best first; all variants if there is only
            one loss, trained in one of these ways.
        contrasts: the first of `best` compared with each other one of them.
    """

    measure: Measure
    ranked: list[Variant]
    best: list[Variant]
    contrasts: list[Contrast]

    @property
    def is_of_settings(self) -> bool:
        """Whether there is one loss alone, trained in one way, so that the variants differ in their settings."""
        return len({_way(variant) for variant in self.best}) == 1

    @property
    def is_of_losses(self) -> bool:
        """Whether each of `best` stands for a loss, because all are trained on-policy, or all offline."""
        return not self.is_of_settings and len({is_onpolicy for _, is_onpolicy in map(_way, self.best)}) == 1

    @property
    def first(self) -> list[Variant]:
        """The best variant, and those with the same value."""
        return [variant for variant in self.ranked if self.measure.mean(variant) == self.measure.mean(self.ranked[0])]


@dataclass(slots=True)
class Comparison:
    """The runs and what was found.

    Attributes:
        copies: the names of runs that were left out because they are copies, with the name of the original.
        differing_settings: dotted keys of the settings with more than one value.
        standing: None if no variant can be ranked.
        between: what a judge has said of their answers against each other; None without files of `alignment.evaluate`.
        evaluated_in: the folder of such files.
    """

    members: list[ComparedRun]
    copies: dict[str, str]
    variants: list[Variant]
    differing_settings: list[str]
    standing: Standing | None
    between: Between | None = None
    evaluated_in: Path | None = None

    @property
    def rank_by(self) -> Measure | None:
        """The measure that ranks the variants; None if no variant can be ranked."""
        return self.standing.measure if self.standing else None

    @property
    def ranked(self) -> list[Variant]:
        """The ranked variants, the best first."""
        return self.standing.ranked if self.standing else []

    @property
    def best(self) -> list[Variant]:
        """See `Standing`."""
        return self.standing.best if self.standing else []

    @property
    def contrasts(self) -> list[Contrast]:
        """The best variant compared with each other one of `best`."""
        return self.standing.contrasts if self.standing else []

    @property
    def titles(self) -> dict[str, str]:
        """Variant and seed of each run, by the run's name."""
        found = {
            member.name: f"{variant.label}, seed {format_value(member.seed)}"
            for variant in self.variants
            for member in variant.begun
        }
        often = Counter(found.values())
        titles = {name: title if often[title] == 1 else f"{title} ({name})" for name, title in found.items()}
        return {member.name: titles.get(member.name, member.name) for member in self.members}


def compare(members: Sequence[ComparedRun]) -> Comparison:
    """Group runs into variants, rank them, and test whether the best one's lead is noise."""
    members, copies = without_copies(members)
    make_comparable(members)
    several = variants(members)
    measure = ranking_measure(several)
    settings = differing_settings([member for member in members if member.loss])
    return Comparison(members, copies, several, settings, rank_variants(several, measure) if measure else None)


def in_rank_order(found: Sequence[Variant], measure: Measure) -> list[Variant]:
    """The variants that have the measure, the best first; reward accuracy orders equal ones."""
    known = [variant for variant in found if measure.values(variant)]
    return sorted(known, key=lambda variant: (-(measure.mean(variant) or 0.0), -(ACCURACY.mean(variant) or 0.0)))


def rank_variants(found: Sequence[Variant], measure: Measure) -> Standing:
    """Rank the variants that have the measure (there must be one), and compare the best as `Standing` says."""
    ranked = in_rank_order(found, measure)
    ways = dict.fromkeys(map(_way, ranked))
    best = [next(variant for variant in ranked if _way(variant) == way) for way in ways]
    best = best if len(best) > 1 else ranked
    top, *others = best
    pairs = [(other, d) for other in others if (d := _difference(measure, top, other)) is not None]
    adjusted = iter(holm([d.p for _, d in pairs if d.p is not None]))
    worst = min(measure.values(top))
    contrasts = [
        Contrast(other, d, None if d.p is None else next(adjusted), max(measure.values(other)) >= worst)
        for other, d in pairs
    ]
    return Standing(measure, ranked, best, contrasts)


def _way(variant: Variant) -> tuple[str, bool]:
    """The loss, and whether it was trained on answers of the policy."""
    return variant.loss, any(submapping(member.run.config, "onpolicy") for member in variant.begun)


def _difference(measure: Measure, a: Variant, b: Variant) -> Difference | None:
    paired = paired_difference(measure.by_item(a), measure.by_item(b))
    mean_a, mean_b = measure.mean(a), measure.mean(b)
    bounds_a, bounds_b = interval(measure, a), interval(measure, b)
    if paired is not None or mean_a is None or mean_b is None or bounds_a is None or bounds_b is None:
        return paired
    return unpaired_difference(mean_a, bounds_a, mean_b, bounds_b, min(measure.num_items(a), measure.num_items(b)))


def interval(measure: Measure, variant: Variant) -> tuple[float, float] | None:
    """95% interval of a share; None if the measure is no share, or unknown.

    Wilson's interval, and for a win rate with ties Tango's. The number of items is that of one seed, because all seeds
    see the same items; the share of ties is the mean over the seeds.
    """
    mean, count = measure.mean(variant), measure.num_items(variant)
    if mean is None or not count:
        return None
    tied = [measure.tied(member) for member in variant.members if measure.value(member) is not None]
    return tango_interval(mean, sum(tied) / len(tied), count)
