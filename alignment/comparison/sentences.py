"""The sentences of a comparison: its result, and what a careful reader should ask first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from alignment.comparison.measures import ACCURACY, WIN_RATE, Measure
from alignment.comparison.members import ComparedRun, Variant
from alignment.comparison.needs import in_words, need_of
from alignment.comparison.ranking import Comparison, Contrast, Standing, interval, rank_variants
from alignment.comparison.statistics import paired_difference
from alignment.losses import title as loss_title
from alignment.runs.cautions import cautions as run_cautions
from alignment.runs.folder import dig, status
from alignment.runs.text import format_value, percent, points, short_hash

_SURE = "more than noise"

_NAMED_IN_SENTENCE = 4
"""Up to this many variants, a sentence names each, or each has a sentence."""


def _share(measure: Measure, variant: Variant) -> str:
    found = interval(measure, variant)
    return percent(measure.mean(variant)) + (f" ({percent(found[0])} to {percent(found[1])})" if found else "")


def _listed(names: Sequence[str]) -> str:
    if len(names) > _NAMED_IN_SENTENCE:
        return f"{len(names)} others"
    return " and ".join(["; ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def counted(count: int, what: str) -> str:
    """The number with its noun: 1 run, 2 runs."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def overview(found: Comparison) -> str:
    """What is compared, in one sentence."""
    losses = list(dict.fromkeys(loss_title(variant.loss) for variant in found.variants))
    seeds = list(dict.fromkeys(format_value(member.seed) for member in found.members if member.seed is not None))
    said = [counted(len(found.members), "run")]
    if losses:
        said.append(f"{counted(len(found.variants), 'variant')} of {', '.join(losses)}")
        said.append(f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}")

    def if_same(sentence: str, *keys: str) -> None:
        values = {
            format_value(value) for member in found.members if (value := dig(member.run.summary, *keys)) is not None
        }
        if len(values) == 1:
            said.append(sentence.format(values.pop()))

    if_same("model {}", "model", "name")
    if_same("{} rows to train on", "data", "preference", "train")
    if_same("{} rows held out", "data", "preference", "eval")
    if_same("{} prompts answered", "evaluation", "prompts")
    return f"{', '.join(said)}."


def judge_contrast(contrast: Contrast) -> str:
    """Whether the difference is noise, in words."""
    difference = contrast.difference
    if difference.is_noise:
        return "within noise"
    if not contrast.is_told_by_items:
        return "not certain: the interval excludes zero, but p is above 0.05"
    if contrast.seeds_overlap:
        return "more than noise between items, but single seeds of the two overlap"
    return _SURE


def headline(found: Comparison) -> list[str]:
    """The result, in a few sentences."""
    standing = found.standing
    if standing is None:
        return ["No member has a result to rank by."]
    measure, top, several = standing.measure, standing.best[0], len(standing.ranked) > 1
    said = [f"{'Ranked by' if several else 'By'} {measure.axis}, {_leader(standing)}.", *_lead(standing)]
    if measure is WIN_RATE:
        said.append(_against_start(top, several))
    said += _behind(standing)
    if measure is not ACCURACY and all(ACCURACY.values(variant) for variant in found.ranked):
        other = rank_variants(found.variants, ACCURACY)
        if other.first != standing.first:
            said.append(" ".join([f"By {ACCURACY.name}, {_leader(other)}.", *_lead(other, again=True)]))
    if stopped := sum(member.is_stopped for member in found.members):
        said.append(f"Stopped early and not ranked: {stopped} of {counted(len(found.members), 'member')}.")
    if len(found.ranked) > 2:
        said.append(
            "The best setting was chosen on the same items that its result is from, which flatters it a little: check "
            "it on fresh items before you rely on it."
        )
    return said


def _leader(standing: Standing) -> str:
    """Which variant is first, and its value."""
    measure, top, first = standing.measure, standing.best[0], [variant.label for variant in standing.first]
    among = counted(len(standing.ranked), "variant")
    if len(standing.ranked) == 1:
        who = f"{top.label} is alone,"
    elif len(first) == 1:
        who = f"{top.label} is first of {among}"
    elif len(first) <= _NAMED_IN_SENTENCE:
        who = f"{_listed(first)} share the first place of {among}"
    else:
        who = f"{len(first)} of {among} share the first place,"
    items = f"{measure.num_items(top)} held-out {measure.unit}"
    seeds = f", a mean over {len(top.members)} seeds" if len(top.members) > 1 else ""
    return f"{who} with {_share(measure, top)} on {items}{seeds}"


def _lead(standing: Standing, again: bool = False) -> list[str]:
    """Whether the first is the winner."""
    if not standing.contrasts:
        return []
    behind = [a.other.label for a in standing.contrasts if judge_contrast(a) == _SURE]
    top = "It" if len(standing.first) == 1 else standing.best[0].label
    others = "the other losses' best" if standing.is_of_losses else "the others"
    others = "the other settings" if standing.is_of_settings else others
    if len(behind) == len(standing.contrasts):
        return [f"{top} is ahead of {others} by more than noise."]
    if all(a.difference.is_noise for a in standing.contrasts):
        if again:
            return ["Chance explains this order too."]
        return [
            f"There is no clear winner: with this number of held-out {standing.measure.unit} and seeds, "
            "chance explains the order."
        ]
    if not behind:
        return [f"{top} is not clearly ahead of any of {others}."]
    unsure = [a.other.label for a in standing.contrasts if judge_contrast(a) != _SURE]
    return [f"{top} is ahead of {_listed(behind)} by more than noise, but not clearly ahead of {_listed(unsure)}."]


def _against_start(variant: Variant, is_first: bool) -> str:
    """Whether the variant beats the model it started from; prompt by prompt if the answers are known."""
    won = WIN_RATE.by_item(variant)
    found = paired_difference(won, {prompt: 1 - share for prompt, share in won.items()})
    bounds = interval(WIN_RATE, variant)
    is_draw, counts = bounds is None or bounds[0] <= 0.5, ""
    if found is not None:
        is_draw = is_draw or found.value <= 0 or found.is_noise or (found.p or 0.0) > 0.05
        counts = f": better on {found.better} of {found.count} prompts, worse on {found.worse}"
    if not is_draw:
        return f"{'The first' if is_first else 'It'} beats the model it started from by more than noise{counts}."
    who = "Even the first" if is_first else "It"
    said = f"{who} does not clearly beat the model it started from{counts}"
    if bounds is not None and bounds[0] > 0.5:
        return f"{said}; the interval excludes a draw, the exact test does not."
    return f"{said}."


def _behind(standing: Standing) -> list[str]:
    """How far the others are behind, if they are few or differ by more than noise; the table has all."""
    ahead = "the first" if len(standing.first) == 1 else standing.best[0].label
    told = standing.contrasts if len(standing.contrasts) <= _NAMED_IN_SENTENCE else []
    if told and all(contrast.difference.is_noise for contrast in told):
        told = [max(told, key=lambda contrast: contrast.difference.value)]
    is_furthest = len(told) < len(standing.contrasts) and any(contrast.difference.value for contrast in told)
    said: list[str] = []
    is_planned = False
    for contrast in told:
        d = contrast.difference
        gap = f"{points(d.value)} points behind" if d.value else "level with"
        items = standing.measure.num_items(standing.best[0])
        known = f", on the {d.count} of {items} {standing.measure.unit} that both kept" if d.count < items else ""
        plan = ""
        if (need := need_of(standing, contrast)) is not None:
            plan = f" {in_words(need, d, standing.measure.unit, again=is_planned)}"
            is_planned = is_planned or not need.is_hopeless
        said.append(
            f"{'Furthest behind: ' if is_furthest else ''}{contrast.other.label} is {gap} {ahead}{known} (95% interval "
            f"of the difference {points(d.low)} to {points(d.high)}): {judge_contrast(contrast)}.{plan}"
        )
    return said


def cautions(found: Comparison) -> list[tuple[str, list[str]]]:
    """What a careful reader should ask first: sentences, each with a line for every member that it is about."""
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

    # What should be the same for all
    if found.copies:
        copies = [f"{copy}: the same run as {name}" for copy, name in found.copies.items()]
        said.append(("Copies of a run are left out", copies))
    unequal("Members trained on different preference data", of_summary("data", "preference", "fingerprint"))
    unequal("Members have different numbers of held-out pairs", of_summary("data", "preference", "eval"))
    unequal("Members trained for different numbers of steps", steps)
    unequal("Members have references of different kinds", of_summary("reference", "mode"))
    _unequal_starts(trained, said)
    unequal("Members answered different numbers of prompts", of_summary("evaluation", "prompts"))
    unequal("Members were judged by different judges", of_summary("evaluation", "judge", "identity"))
    unequal("Members ran different versions of the code", of_summary("git_commit"))
    unequal("Members ran different versions of torch", of_summary("versions", "torch"))

    # Early stopping and seeds
    if stopped := [member for member in trained if member.is_stopped]:
        title = "Members that were stopped early were behind at that step, perhaps by chance: they might have caught up"
        said.append((title, [f"{found.titles[member.name]}: {status(member.run.summary)}" for member in stopped]))
    _seeds(found, said)

    # What single runs warn of
    by_kind: dict[str, dict[str, list[str]]] = {}
    for member in found.members:
        for caution in () if member.is_stopped else run_cautions(member.run):
            by_kind.setdefault(caution.kind, {}).setdefault(found.titles[member.name], []).append(caution.text)
    return said + [
        (kind, [f"{title}: {' '.join(texts)}" for title, texts in about.items()]) for kind, about in by_kind.items()
    ]


def _who(found: Comparison, members: Sequence[ComparedRun]) -> str:
    """Their names; a loss stands for its members if all of them are meant."""
    whole = [
        loss
        for loss in dict.fromkeys(member.loss for member in members)
        if sum(m.loss == loss for m in members) == sum(m.loss == loss for m in found.members) > 1
    ]
    said = [f"all of {loss_title(loss)}" for loss in whole]
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
        said.append(("One seed per variant: you cannot tell how much a result depends on the seed", []))
    elif len(counts) > 1:
        details = [f"{label}: {', '.join(sorted(of_variant))}" for label, of_variant in seeds.items()]
        said.append(("Variants have results from different numbers of seeds", details))
    if parted := [variant for variant in found.ranked if variant.stopped]:
        title = "In some variants only the better seeds trained to the end, which flatters their means"
        said.append((title, [f"{v.label}: {len(v.stopped)} of {len(v.begun)} stopped" for v in parted]))
    again = [
        ", ".join(member.name for member in variant.members if member.seed == seed)
        for variant in found.variants
        for seed, times in Counter(variant.seeds).items()
        if times > 1
    ]
    if again:
        said.append(("Members with the same settings and seed ended with different policies; each counts", again))


def _unequal_starts(trained: Sequence[ComparedRun], said: list[tuple[str, list[str]]]) -> None:
    """Members of one seed should start from the same policy; between seeds SFT may differ."""
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
        said.append(
            ("Members with the same seed started from different policies or have different references", details)
        )
    elif len({start for starts in by_seed.values() for start in starts}) > 1:
        said.append(("Each seed started from its own policy: the spread over seeds includes that of SFT", details))


def not_available(found: Comparison) -> list[str]:
    """What could not be read or did not end, by member."""
    said = [f"{member.name}: {problem}" for member in found.members for problem in member.run.problems]
    return [*said, *(found.between.problems if found.between is not None else [])]
