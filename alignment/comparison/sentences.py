"""What a comparison says in sentences: what came out, and what a careful reader would ask first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignment.comparison.measures import ACCURACY, WIN_RATE, Measure
from alignment.comparison.members import Member, Variant
from alignment.comparison.ranking import Against, Comparison, interval
from alignment.run_folder import get, percent, short, shown, warnings


def points(value: float) -> str:
    """A share, or a difference of two, in percentage points."""
    return f"{100 * value:.1f}"


def _share(measure: Measure, variant: Variant) -> str:
    found = interval(measure, variant)
    return percent(measure.mean(variant)) + (f" ({percent(found[0])} to {percent(found[1])})" if found else "")


def judged(against: Against) -> str:
    """Whether a difference is noise, in words."""
    difference = against.difference
    if difference.is_noise:
        return "within noise"
    if against.p is not None and against.p > 0.05:
        return "not certain: the interval leaves out zero, the sign test over all comparisons does not"
    if against.seeds_overlap:
        return "more than noise of the items, but single seeds of the two overlap"
    return "more than noise"


def headline(found: Comparison) -> list[str]:
    """What the comparison says, in a few sentences."""
    measure = found.rank_by
    if measure is None or not found.ranked:
        return ["No member has a result that variants could be ranked by."]
    top = found.best[0]
    first = [variant.label for variant in found.ranked if measure.mean(variant) == measure.mean(top)]
    place = f"{first[0]} is first" if len(first) == 1 else f"{', '.join(first)} share the first place"
    said = [
        f"Ranked by {measure.axis}, {place} of {len(found.ranked)} variants with {_share(measure, top)} on "
        f"{measure.num_items(top)} held-out items" + (", a mean over seeds." if len(top.members) > 1 else ".")
    ]
    for against in found.against:
        difference = against.difference
        behind = f"{points(difference.value)} points behind {'it' if len(first) == 1 else first[0]}"
        said.append(
            f"{against.other.label} is {behind} (95% interval of the difference {points(difference.low)} to "
            f"{points(difference.high)}): {judged(against)}."
        )
    if found.against and all(a.difference.is_noise for a in found.against):
        said.append(
            "So none of these can be called the winner: with as many held-out items and seeds, chance explains the "
            "order."
        )
    if measure is WIN_RATE and (low_high := interval(measure, top)) and low_high[0] <= 0.5:
        said.append("Even the first cannot be told from a draw with the model that it started from.")
    if measure is not ACCURACY and all(ACCURACY.values(variant) for variant in found.ranked):
        ablest = max(found.ranked, key=lambda variant: ACCURACY.mean(variant) or 0.0)
        if first != [ablest.label]:
            said.append(f"By {ACCURACY.name} the first is {ablest.label} with {_share(ACCURACY, ablest)}.")
    if len(found.ranked) > 2:
        said.append(
            "The best setting was picked by the same items that it is reported on, which flatters it a little: check "
            "it on fresh ones before building on it."
        )
    return said


def cautions(found: Comparison) -> list[tuple[str, list[str]]]:
    """What a careful reader would ask first: a sentence each, with the members that it is about."""
    said: list[tuple[str, list[str]]] = []
    trained = [member for member in found.members if member.loss]

    def unequal(title: str, key: Any) -> None:
        by_value: dict[str, list[str]] = {}
        for member in trained:
            if (value := key(member)) is not None:
                by_value.setdefault(str(value), []).append(member.name)
        if len(by_value) > 1:
            said.append((title, [f"{short(value)}: {', '.join(names)}" for value, names in by_value.items()]))

    def of_summary(*keys: str) -> Any:
        return lambda member: get(member.run.summary, *keys)

    if found.copies:
        copies = [f"{copy}: the same run as {name}" for copy, name in found.copies.items()]
        said.append(("A run that is there twice is counted once", copies))
    unequal("The preference data are not the same", of_summary("data", "preference", "fingerprint"))
    unequal("The numbers of held-out pairs are not the same", of_summary("data", "preference", "eval"))
    unequal("The numbers of steps are not the same", of_summary("stages", "preference", "steps"))
    unequal("References of different kinds", of_summary("reference", "mode"))
    _unequal_starts(trained, said)
    unequal("Answers to different numbers of prompts", of_summary("evaluation", "prompts"))
    unequal("The code is not the same", of_summary("git_commit"))
    unequal("The versions of torch are not the same", of_summary("versions", "torch"))
    counts = {len(set(variant.seeds)) for variant in found.ranked}
    if counts == {1}:
        said.append(("One seed per variant: how much the result moves with the seed is not known", []))
    elif len(counts) > 1:
        said.append(
            (
                "The variants have different numbers of seeds",
                [f"{variant.label}: {len(set(variant.seeds))}" for variant in found.ranked],
            )
        )
    by_kind: dict[str, list[str]] = {}
    for member in found.members:
        for warned in warnings(member.run):
            by_kind.setdefault(warned.kind, []).append(f"{member.name}: {warned.text}")
    return said + list(by_kind.items())


def _unequal_starts(trained: Sequence[Member], said: list[tuple[str, list[str]]]) -> None:
    """Members of one seed that started from different policies; between seeds SFT itself may differ."""
    by_seed: dict[Any, dict[str, list[str]]] = {}
    for member in trained:
        start = get(member.run.summary, "stages", "preference", "start", "identity")
        start = start or get(member.run.summary, "reference", "identity")
        if start is not None:
            by_seed.setdefault(member.seed, {}).setdefault(str(start), []).append(member.name)
    details = [
        f"seed {shown(seed)}, {short(start)}: {', '.join(names)}"
        for seed, starts in by_seed.items()
        for start, names in starts.items()
    ]
    if any(len(starts) > 1 for starts in by_seed.values()):
        said.append(("Members of one seed started from different policies, or have different references", details))
    elif len({start for starts in by_seed.values() for start in starts}) > 1:
        said.append(
            ("Each seed started from a policy of its own: the spread over seeds holds that of SFT too", details)
        )


def not_available(found: Comparison) -> list[str]:
    """What could not be read, or did not end, by member."""
    return [f"{member.name}: {problem}" for member in found.members for problem in member.run.problems]
