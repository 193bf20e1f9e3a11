"""What a comparison says in sentences: what came out, and what a careful reader would ask first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from alignment.comparison.measures import ACCURACY, WIN_RATE, Measure
from alignment.comparison.members import ComparedRun, Variant
from alignment.comparison.ranking import Comparison, Contrast, Standing, interval, rank_variants
from alignment.comparison.statistics import paired_difference
from alignment.runs.cautions import cautions as run_cautions
from alignment.runs.folder import dig, status
from alignment.runs.text import format_value, percent, short_hash

_SURE = "more than noise"

_NAMED_IN_SENTENCE = 4
"""As many can be listed in a sentence, or be sentences of their own."""


def points(value: float) -> str:
    """A share, or a difference of two, in percentage points."""
    return f"{100 * value:.1f}"


def _share(measure: Measure, variant: Variant) -> str:
    found = interval(measure, variant)
    return percent(measure.mean(variant)) + (f" ({percent(found[0])} to {percent(found[1])})" if found else "")


def _listed(names: Sequence[str]) -> str:
    if len(names) > _NAMED_IN_SENTENCE:
        return f"{len(names)} others"
    return " and ".join(["; ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def overview(found: Comparison) -> str:
    """What is compared, in a sentence."""
    losses = list(dict.fromkeys(variant.loss.upper() for variant in found.variants))
    seeds = list(dict.fromkeys(format_value(member.seed) for member in found.members))
    said = [_counted(len(found.members), "run")]
    if losses:
        said.append(f"{_counted(len(found.variants), 'variant')} of {', '.join(losses)}")
        said.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}")

    def only(name: str, *keys: str) -> None:
        values = {
            format_value(value) for member in found.members if (value := dig(member.run.summary, *keys)) is not None
        }
        if len(values) == 1:
            said.append(name.format(values.pop()))

    only("model {}", "model", "name")
    only("trained on {} rows of preferences", "data", "preference", "train")
    only("{} rows held out", "data", "preference", "eval")
    only("{} prompts answered", "evaluation", "prompts")
    return f"{', '.join(said)}."


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def judge_contrast(contrast: Contrast) -> str:
    """Whether a difference is noise, in words."""
    difference = contrast.difference
    if difference.is_noise:
        return "within noise"
    if contrast.p is not None and contrast.p > 0.05:
        return "not certain: the interval leaves out zero, p is above 0.05"
    if contrast.seeds_overlap:
        return "more than noise of the items, but single seeds of the two overlap"
    return _SURE


def headline(found: Comparison) -> list[str]:
    """What the comparison says, in a few sentences."""
    standing = found.standing
    if standing is None:
        return ["No member has a result that variants could be ranked by."]
    measure, top, several = standing.measure, standing.best[0], len(standing.ranked) > 1
    said = [f"{'Ranked by' if several else 'By'} {measure.axis}, {_place(standing)}.", *_verdict(standing)]
    if measure is WIN_RATE:
        said.append(_against_start(top, several))
    said += _behind(standing)
    if measure is not ACCURACY and all(ACCURACY.values(variant) for variant in found.ranked):
        other = rank_variants(found.variants, ACCURACY)
        if other.first != standing.first:
            said.append(" ".join([f"By {ACCURACY.name}, {_place(other)}.", *_verdict(other, again=True)]))
    if stopped := sum(member.is_stopped for member in found.members):
        said.append(f"Stopped early, and so not ranked: {stopped} of {_counted(len(found.members), 'member')}.")
    if len(found.ranked) > 2:
        said.append(
            "The best setting was picked by the same items that it is reported on, which flatters it a little: check "
            "it on fresh ones before building on it."
        )
    return said


def _place(standing: Standing) -> str:
    """Who is first, with what."""
    measure, top, first = standing.measure, standing.best[0], [variant.label for variant in standing.first]
    among = _counted(len(standing.ranked), "variant")
    if len(standing.ranked) == 1:
        who = f"{top.label} is alone,"
    elif len(first) == 1:
        who = f"{top.label} is first of {among}"
    else:
        who = f"{_listed(first)} share the first place of {among}"
        if len(first) > _NAMED_IN_SENTENCE:
            who = f"{len(first)} of {among} share the first place,"
    items = f"{measure.num_items(top)} held-out {measure.unit}"
    seeds = f", a mean over {len(top.members)} seeds" if len(top.members) > 1 else ""
    return f"{who} with {_share(measure, top)} on {items}{seeds}"


def _verdict(standing: Standing, again: bool = False) -> list[str]:
    """Whether the first is the winner."""
    if not standing.contrasts:
        return []
    behind = [a.other.label for a in standing.contrasts if judge_contrast(a) == _SURE]
    top = "It" if len(standing.first) == 1 else standing.best[0].label
    others = "the other settings" if len({variant.loss for variant in standing.best}) == 1 else "the other losses' best"
    if len(behind) == len(standing.contrasts):
        return [f"{top} is ahead of {others} by more than noise."]
    if all(a.difference.is_noise for a in standing.contrasts):
        if again:
            return ["Chance explains this order too."]
        return [
            f"So none of these can be called the winner: with as many held-out {standing.measure.unit} and seeds, "
            "chance explains the order."
        ]
    if not behind:
        return [f"{top} is not surely ahead of any of {others}."]
    unsure = [a.other.label for a in standing.contrasts if judge_contrast(a) != _SURE]
    return [f"{top} is ahead of {_listed(behind)} by more than noise, and not surely ahead of {_listed(unsure)}."]


def _against_start(variant: Variant, is_first: bool) -> str:
    """Whether the first is better than what it began as, by its single wins where they are known."""
    won = WIN_RATE.by_item(variant)
    found = paired_difference(won, {prompt: 1 - share for prompt, share in won.items()})
    bounds = interval(WIN_RATE, variant)
    is_draw, counts = bounds is None or bounds[0] <= 0.5, ""
    if found is not None:
        is_draw = is_draw or found.value <= 0 or found.is_noise or (found.p or 0.0) > 0.05
        counts = f": better on {found.better} of {found.count} prompts, worse on {found.worse}"
    if is_draw:
        who = "Even the first" if is_first else "It"
        if bounds is not None and bounds[0] > 0.5:
            return (
                f"{who} is not surely better than the model that it started from{counts}; the interval alone says so."
            )
        return f"{who} cannot be told from a draw with the model that it started from{counts}."
    return f"{'The first' if is_first else 'It'} beats the model that it started from by more than noise{counts}."


def _behind(standing: Standing) -> list[str]:
    """By how much, of as many as can be read in passing; the table has all."""
    ahead = "the first" if len(standing.first) == 1 else standing.best[0].label
    told = standing.contrasts if len(standing.contrasts) <= _NAMED_IN_SENTENCE else []
    if told and all(contrast.difference.is_noise for contrast in told):
        told = [max(told, key=lambda contrast: contrast.difference.value)]
    furthest = len(told) < len(standing.contrasts) and any(contrast.difference.value for contrast in told)
    which = "Of the others the furthest behind: " if furthest else ""
    said = []
    for contrast in told:
        d = contrast.difference
        gap = f"{points(d.value)} points behind" if d.value else "level with"
        items = standing.measure.num_items(standing.best[0])
        known = f", on the {d.count} of {items} {standing.measure.unit} that are kept" if d.count < items else ""
        said.append(
            f"{which}{contrast.other.label} is {gap} {ahead}{known} (95% interval of the difference {points(d.low)} to "
            f"{points(d.high)}): {judge_contrast(contrast)}."
        )
    return said


def cautions(found: Comparison) -> list[tuple[str, list[str]]]:
    """What a careful reader would ask first: a sentence each, with the members that it is about."""
    said: list[tuple[str, list[str]]] = []
    trained = [member for member in found.members if member.loss]

    def unequal(title: str, key: Any) -> None:
        by_value: dict[str, list[ComparedRun]] = {}
        for member in trained:
            if (value := key(member)) is not None:
                by_value.setdefault(str(value), []).append(member)
        if len(by_value) > 1:
            said.append((title, [f"{short_hash(value)}: {_who(found, about)}" for value, about in by_value.items()]))

    def of_summary(*keys: str) -> Any:
        return lambda member: dig(member.run.summary, *keys)

    def steps(member: ComparedRun) -> Any:
        return None if member.is_stopped else dig(member.run.summary, "stages", "preference", "steps")

    if found.copies:
        copies = [f"{copy}: the same run as {name}" for copy, name in found.copies.items()]
        said.append(("A run that is there twice is counted once", copies))
    unequal("The preference data are not the same", of_summary("data", "preference", "fingerprint"))
    unequal("The numbers of held-out pairs are not the same", of_summary("data", "preference", "eval"))
    unequal("The numbers of steps are not the same", steps)
    unequal("References of different kinds", of_summary("reference", "mode"))
    _unequal_starts(trained, said)
    unequal("Answers to different numbers of prompts", of_summary("evaluation", "prompts"))
    unequal("The code is not the same", of_summary("git_commit"))
    unequal("The versions of torch are not the same", of_summary("versions", "torch"))
    if stopped := [member for member in trained if member.is_stopped]:
        title = "Stopped early is what was behind on the way, perhaps by chance: it might have been ahead at the end"
        said.append((title, [f"{found.titles[member.name]}: {status(member.run.summary)}" for member in stopped]))
    _seeds(found, said)
    by_kind: dict[str, dict[str, list[str]]] = {}
    for member in found.members:
        for warned in () if member.is_stopped else run_cautions(member.run):
            by_kind.setdefault(warned.kind, {}).setdefault(found.titles[member.name], []).append(warned.text)
    return said + [
        (kind, [f"{title}: {' '.join(texts)}" for title, texts in about.items()]) for kind, about in by_kind.items()
    ]


def _who(found: Comparison, members: Sequence[ComparedRun]) -> str:
    """Their names; of a loss whose members all are among them, that of the loss."""
    whole = [
        loss
        for loss in dict.fromkeys(member.loss for member in members)
        if sum(m.loss == loss for m in members) == sum(m.loss == loss for m in found.members) > 1
    ]
    said = [f"all of {loss.upper()}" for loss in whole]
    return ", ".join([*said, *(member.name for member in members if member.loss not in whole)])


def _seeds(found: Comparison, said: list[tuple[str, list[str]]]) -> None:
    measure = found.rank_by
    if measure is None:
        return
    seeds = {
        variant.label: {format_value(member.seed) for member in variant.members if measure.value(member) is not None}
        for variant in found.ranked
    }
    counts = {len(of_variant) for of_variant in seeds.values()}
    if counts == {1}:
        said.append(("One seed per variant: how much the result moves with the seed is not known", []))
    elif len(counts) > 1:
        details = [f"{label}: {', '.join(sorted(of_variant))}" for label, of_variant in seeds.items()]
        said.append(("The variants have results of different numbers of seeds", details))
    if parted := [variant for variant in found.ranked if variant.stopped]:
        title = "Of some variants only the better seeds trained to the end, which flatters their means"
        said.append((title, [f"{v.label}: {len(v.stopped)} of {len(v.begun)} stopped" for v in parted]))
    again = [
        ", ".join(member.name for member in variant.members if member.seed == seed)
        for variant in found.variants
        for seed, times in Counter(variant.seeds).items()
        if times > 1
    ]
    if again:
        said.append(("Members with the same settings and seed ended with different policies, and count as two", again))


def _unequal_starts(trained: Sequence[ComparedRun], said: list[tuple[str, list[str]]]) -> None:
    """Members of one seed that started from different policies; between seeds SFT itself may differ."""
    by_seed: dict[Any, dict[str, list[str]]] = {}
    for member in trained:
        start = dig(member.run.summary, "stages", "preference", "start", "identity")
        start = start or dig(member.run.summary, "reference", "identity")
        if start is not None:
            by_seed.setdefault(member.seed, {}).setdefault(str(start), []).append(member.name)
    details = [
        f"seed {format_value(seed)}, {short_hash(start)}: {', '.join(names)}"
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
