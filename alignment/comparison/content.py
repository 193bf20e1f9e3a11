"""What a comparison says, before it is a page: sections of sentences, tables, charts and samples."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.comparison.members import (
    ACCURACY,
    CORRECT,
    CRITERIA,
    DRIFT,
    MARGIN,
    RANKING_PER_TOKEN,
    WIN_RATE,
    WORDS,
    Measure,
    Member,
    Variant,
    baseline,
    criterion,
    differing,
    kl,
    variants,
)
from alignment.comparison.statistics import Difference, holm, paired_difference, ranks, unpaired_difference
from alignment.run_folder import MODELS, NONE, SAMPLES, get, percent, section, short, shown, warnings, wilson_interval


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are plain text; the first of a row is its heading."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    is_numbers: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said to a prompt, and what the judge thought of it."""

    model: str
    text: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out prompt with the answers of all members."""

    prompt: str
    answers: list[Answer]


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
        rank_by: what variants are ranked by; None where nothing of it is known.
        ranked: the variants that have it, the best first.
        best: of each loss, the best first; with one loss only, all its variants.
        against: the best of all against each other of `best`.
    """

    members: list[Member]
    variants: list[Variant]
    differing: list[str]
    rank_by: Measure | None = None
    ranked: list[Variant] = field(default_factory=list)
    best: list[Variant] = field(default_factory=list)
    against: list[Against] = field(default_factory=list)


def compare(members: Sequence[Member]) -> Comparison:
    """Rank the variants, and ask of the differences between the best whether they are noise."""
    found = Comparison(list(members), variants(members), differing([m for m in members if m.loss]))
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


# Sentences


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _share(measure: Measure, variant: Variant) -> str:
    found = interval(measure, variant)
    return percent(measure.mean(variant)) + (f" ({percent(found[0])} to {percent(found[1])})" if found else "")


def _judged(against: Against) -> str:
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
        behind = f"{_points(difference.value)} points behind {'it' if len(first) == 1 else first[0]}"
        said.append(
            f"{against.other.label} is {behind} (95% interval of the difference {_points(difference.low)} to "
            f"{_points(difference.high)}): {_judged(against)}."
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


# Tables


def results(found: Comparison) -> Table:
    """A row per variant: losses times settings."""
    shown_measures = [m for m in (*CRITERIA, RANKING_PER_TOKEN) if any(m.values(v) for v in found.variants)]
    plain = [m for m in (MARGIN, DRIFT, WORDS, kl(found.members)) if m and any(m.values(v) for v in found.variants)]
    header = ["variant", "seeds", "rank", "rank by seed"]
    header += [measure.name for measure in (*shown_measures, *plain)]
    places = _places(found)
    by_seed = _ranks_by_seed(found)
    rows = []
    for variant in [*found.ranked, *(v for v in found.variants if v not in found.ranked)]:
        row = [variant.label, ", ".join(shown(seed) for seed in variant.seeds)]
        row += [shown(places.get(id(variant))), by_seed.get(id(variant), NONE)]
        for measure in shown_measures:
            row.append(_cell(measure, variant))
        for measure in plain:
            row.append(_spread(measure, variant))
        rows.append(row)
    return Table(
        "Losses and settings, the best first" if found.ranked else "Losses and settings",
        header,
        rows,
        "Values are means over seeds; in parentheses the 95% interval, and below it what the single seeds gave. The "
        "interval is Wilson's for as many items as were asked; seeds ask the same, so they make it no narrower. "
        + " ".join(f"{m.name.capitalize()}: {m.axis}." for m in (*shown_measures, *plain)),
        is_numbers=True,
    )


def _places(found: Comparison) -> dict[int, float]:
    assert found.rank_by is not None or not found.ranked
    values = [found.rank_by.mean(variant) or 0.0 for variant in found.ranked] if found.rank_by else []
    return {id(variant): place for variant, place in zip(found.ranked, ranks(values), strict=True)}


def _ranks_by_seed(found: Comparison) -> dict[int, str]:
    """Mean and spread of the ranks that a variant has among the members of each seed that all variants have."""
    measure = found.rank_by
    if measure is None or not found.ranked:
        return {}
    tables = [
        {member.seed: value for member in variant.members if (value := measure.value(member)) is not None}
        for variant in found.ranked
    ]
    seeds = [seed for seed in tables[0] if all(seed in table for table in tables)]
    if len(seeds) < 2:
        return {}
    by_seed = [ranks([table[seed] for table in tables]) for seed in seeds]
    said = {}
    for i, variant in enumerate(found.ranked):
        own = [places[i] for places in by_seed]
        said[id(variant)] = shown(sum(own) / len(own)) + _by_seeds(own, shown)
    return said


def _cell(measure: Measure, variant: Variant) -> str:
    values = measure.values(variant)
    if not values:
        return NONE
    found = interval(measure, variant)
    text = f"{percent(measure.mean(variant))} of {measure.num_items(variant)}"
    text += f"\n({_points(found[0])} to {_points(found[1])})" if found else ""
    return text + _by_seeds(values, _points)


def _spread(measure: Measure, variant: Variant) -> str:
    values = measure.values(variant)
    if not values:
        return NONE
    return shown(sum(values) / len(values)) + _by_seeds(values, shown)


def _by_seeds(values: Sequence[float], show: Callable[[float], str]) -> str:
    if len(values) == 1:
        return ""
    low, high = show(min(values)), show(max(values))
    return "\nseeds alike" if low == high else f"\nseeds {low} to {high}"


def differences(found: Comparison) -> Table | None:
    """The best against the others."""
    if not found.against:
        return None
    rows = []
    for against in found.against:
        d = against.difference
        how = f"paired, {d.count} items: better on {d.better}, worse on {d.worse}" if d.p is not None else "not paired"
        rows.append(
            [
                against.other.label,
                f"{_points(d.value)} points ({_points(d.low)} to {_points(d.high)})",
                how,
                _p(against.p),
                _judged(against),
            ]
        )
    return Table(
        f"{found.best[0].label} against the others",
        ["other", "ahead by (95% interval)", "items", "p", "in words"],
        rows,
        "Paired: the bootstrap over the items that both were asked, seeds averaged by item first; p is the exact sign "
        "test's (McNemar's with one seed), adjusted after Holm for as many comparisons as there are rows. Not paired: "
        "Newcombe's interval of two shares. Both say what other items would change; what other seeds would, only "
        "the spread over seeds shows.",
    )


def _p(p: float | None) -> str:
    return NONE if p is None else "below 0.001" if p < 0.001 else f"{p:.3f}"


def best_of_each(found: Comparison) -> Table | None:
    """Of each loss its best setting, with what it did there."""
    measure = found.rank_by
    if measure is None or len({variant.loss for variant in found.ranked}) < 2:
        return None
    rows = [
        [v.loss.upper(), v.label, _cell(measure, v), _spread(MARGIN, v), _spread(DRIFT, v), _spread(WORDS, v)]
        for v in found.best
    ]
    header = ["loss", "its best setting", measure.name, *(m.name for m in (MARGIN, DRIFT, WORDS))]
    return Table("The best setting of each loss", header, rows, is_numbers=True)


def what_ran(found: Comparison) -> Table:
    """What all members share, and where they do not, all that there is."""
    facts: dict[str, list[str]] = {}

    def add(name: str, value: Any) -> None:
        if value is not None and shown(value) not in facts.setdefault(name, []):
            facts[name].append(shown(value))

    for member in found.members:
        summary = member.run.summary
        add("recipe", summary.get("recipe"))
        add("model", member.settings.get("model.name", get(summary, "model", "name")))
        add("quantisation", get(summary, "model", "quantization"))
        for stage, prefix in (("sft", "sft.data"), ("preference", "data")):
            info = section(summary, "data", stage)
            title = "SFT data" if stage == "sft" else "preference data"
            if info:
                source = shown(member.settings.get(f"{prefix}.source"))
                add(title, f"{source}: {shown(info.get('train'))} to train on, {shown(info.get('eval'))} held out")
        add("fingerprint of the preference data", _or_none(short, get(summary, "data", "preference", "fingerprint")))
        add("steps of the preference stage", get(summary, "stages", "preference", "steps"))
        add("seeds", member.seed)
        add("commit", summary.get("git_commit"))
        add("machine", get(summary, "machine", "gpu") or get(summary, "machine", "cpu"))
        add("torch", get(summary, "versions", "torch"))
    for variant in found.variants:
        for member in variant.members:
            fixed = {k: v for k, v in member.settings.items() if k.startswith("loss.") and k not in variant.settings}
            said = ", ".join(f"{key.removeprefix('loss.')} {shown(value)}" for key, value in fixed.items())
            add(f"settings of {variant.loss.upper()} that do not differ", said or None)
    facts["what differs between members"] = [", ".join(found.differing) or "nothing but the loss or the seed"]
    rows = [[name, "; ".join(values)] for name, values in facts.items() if values]
    return Table("What was run", ["", ""], rows)


def _or_none(show: Any, value: Any) -> Any:
    return None if value is None else show(value)


def member_table(found: Comparison) -> Table:
    """A row per member, with the settings that differ."""
    keys = found.differing
    header = ["member", "loss", *(key.removeprefix("loss.") for key in keys), "seed", "status", "steps"]
    header += ["seconds", "tokens/s", "peak memory, MiB"]
    rows = []
    for member in found.members:
        stage = section(member.run.summary, "stages", "preference")
        memory = get(stage, "memory", "measured")
        rows.append(
            [
                member.name,
                member.loss or NONE,
                *(shown(member.settings[key]) if key in member.settings else NONE for key in keys),
                shown(member.seed),
                shown(member.run.summary.get("status", "unfinished")),
                shown(stage.get("steps")),
                shown(stage.get("seconds")),
                shown(stage.get("tokens_per_second")),
                f"{memory / 2**20:,.0f}" if isinstance(memory, (int, float)) else NONE,
            ]
        )
    return Table("Members", header, rows, "Time and memory are those of the preference stage.")


def not_available(found: Comparison) -> list[str]:
    """What could not be read, or did not end, by member."""
    return [f"{member.name}: {problem}" for member in found.members for problem in member.run.problems]


# Samples


def questions(found: Comparison) -> list[Question]:
    """Prompts that most members answered, spread over all of them, with the answers side by side."""
    answered = [member for member in found.members if member.run.samples]
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    for member in answered:
        for sample in member.run.samples:
            by_prompt.setdefault(str(sample.get("prompt")), {}).setdefault(member.name, sample)
    most = max((len(samples) for samples in by_prompt.values()), default=0)
    prompts = [prompt for prompt, samples in by_prompt.items() if len(samples) == most]
    count = min(SAMPLES, len(prompts))
    picked = [prompts[i * len(prompts) // count] for i in range(count)]
    labels = {member.name: v.label for v in found.variants for member in v.members}
    return [Question(prompt, _answers(answered, by_prompt[prompt], labels)) for prompt in picked]


def _answers(members: Sequence[Member], samples: dict[str, dict[str, Any]], labels: dict[str, str]) -> list[Answer]:
    said: list[Answer] = []
    for member in members:
        if (sample := samples.get(member.name)) is None:
            continue
        before = baseline(member)
        if sample.get(before) is not None:  # members of one start all say the same
            first = Answer(MODELS[before], str(sample[before]), _verdict(get(sample, "verdicts", before)))
            if first not in said:
                said.append(first)
        name = f"{labels.get(member.name, member.loss or member.name)}, seed {shown(member.seed)}"
        said.append(Answer(name, str(sample.get("final", NONE)), _verdict(get(sample, "verdicts", "final"))))
    return sorted(said, key=lambda answer: answer.model not in MODELS.values())


def _verdict(verdict: Any) -> str:
    if not isinstance(verdict, dict):
        return NONE
    parts = ["right" if verdict.get("correct") is True else "wrong", f"score {shown(verdict.get('score'))}"]
    reasons = verdict.get("reasons")
    return ", ".join([*parts, *(map(str, reasons) if isinstance(reasons, list) else [])])


# CSV


def to_csv(found: Comparison) -> str:
    """A row per member with plain numbers, for spreadsheets and scripts."""
    measures = (*CRITERIA, RANKING_PER_TOKEN, MARGIN, DRIFT, WORDS)
    labels = {id(member): variant.label for variant in found.variants for member in variant.members}
    header = ["member", "variant", "loss", *found.differing, "seed", "status", "n_pairs", "n_answers"]
    header += [f"{m.name}{suffix}" for m in measures for suffix in (["", " low", " high"] if m.share else [""])]
    header += ["kl", "kl is", "seconds", "tokens_per_second", "peak_memory_bytes"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    drawn = kl(found.members)
    for member in found.members:
        stage = section(member.run.summary, "stages", "preference")
        alone = Variant(member.loss, {}, [member])
        row: list[Any] = [member.name, labels.get(id(member)), member.loss]
        row += [member.settings.get(key) for key in found.differing]
        row += [member.seed, member.run.summary.get("status"), ACCURACY.count(member), CORRECT.count(member)]
        for measure in measures:
            row.append(measure.value(member))
            if measure.share:
                row += interval(measure, alone) or (None, None)
        row += [drawn.value(member) if drawn else None, drawn.name if drawn else None]
        row += [stage.get("seconds"), stage.get("tokens_per_second"), get(stage, "memory", "measured")]
        writer.writerow(row)
    return out.getvalue()
