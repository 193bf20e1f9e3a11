"""The tables of a comparison, before they are a page, and its numbers for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.comparison.head_to_head import Duel, duels, entrants
from alignment.comparison.measures import (
    ACCURACY,
    CORRECT,
    CRITERIA,
    DRIFT,
    KLS,
    MARGIN,
    OWN_ACCURACY,
    RANKING,
    RANKING_PER_TOKEN,
    WIN_RATE,
    WORDS,
    Measure,
    kl_error,
    kl_measure,
)
from alignment.comparison.members import ComparedRun, Variant
from alignment.comparison.ranking import Comparison, interval
from alignment.comparison.sentences import judge_contrast, points
from alignment.comparison.statistics import ranks
from alignment.runs.folder import as_count, dig, status, stopped_at, submapping
from alignment.runs.text import DASH, format_value, is_number, percent, short_hash


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are plain text; the first of a row is its heading.

    Attributes:
        columns: what the columns are, where their headings do not say it all.
        shades: of the cells behind the heading, from 0 to 1; None for a cell without.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    is_numbers: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    shades: list[list[float | None]] = field(default_factory=list)


def results(found: Comparison) -> Table:
    """A row per variant, losses times settings: what its answers were worth, and how far it went."""
    measures = [m for m in (WIN_RATE, CORRECT, ACCURACY, found.rank_by) if m and _is_known(m, found)]
    measures = list(dict.fromkeys(sorted(measures, key=lambda measure: measure is not found.rank_by)))
    others = [m for m in (WORDS, kl_measure(found.members)) if m and _is_known(m, found)]
    places, by_seed = _places(found), _ranks_by_seed(found)
    columns = {"rank": f"by {found.rank_by.axis}; equal ones share the mean of their ranks"} if found.rank_by else {}
    columns |= _defined([*measures, *others])
    rows = []
    for variant in _in_order(found):
        row = [variant.label, "stopped" if not variant.members else format_value(places.get(id(variant)))]
        row += [*(_share_cell(m, variant, found) for m in measures), *(_mean_cell(m, variant) for m in others)]
        row += [by_seed.get(id(variant), DASH)] if by_seed else []
        rows.append([*row, _seeds(variant)])
    header = ["variant", "rank", *(_heading(m, found) for m in measures), *(m.name for m in others)]
    if by_seed:
        header.append("rank by seed")
        columns["rank by seed"] = "mean rank among the members of the same seed, and the single ones"
    return Table(
        "Losses and settings, the best first" if found.ranked else "Losses and settings",
        [*header, "seeds"],
        rows,
        _OF_VALUES,
        is_numbers=True,
        columns=columns,
    )


def _seeds(variant: Variant) -> str:
    """Those that the values are of, and those that were stopped early."""
    stopped = [f"{format_value(member.seed)} {stopped_at(member.run.summary)}" for member in variant.stopped]
    return "\n".join([", ".join(format_value(seed) for seed in variant.seeds), *stopped]).strip()


_SEEDS_IN_CELL = 3
"""As many seeds have their values in a cell."""

_OF_VALUES = (
    "Means over seeds; in parentheses the 95% interval, and below it what the single seeds gave. The interval is "
    "Wilson's for as many items (n) as were asked, Tango's for a win rate with ties; seeds ask the same items, so they "
    "make it no narrower."
)


def held_out_pairs(found: Comparison) -> Table | None:
    """A row per variant: what it makes of the held-out pairs."""
    shares = [m for m in (ACCURACY, OWN_ACCURACY, RANKING, RANKING_PER_TOKEN) if _is_known(m, found)]
    others = [m for m in (MARGIN, DRIFT) if _is_known(m, found)]
    if not shares and not others:
        return None
    rows = [
        [variant.label, *(_share_cell(m, variant, found) for m in shares), *(_mean_cell(m, variant) for m in others)]
        for variant in _in_order(found)
    ]
    header = ["variant", *(_heading(m, found) for m in shares), *(m.name for m in others)]
    note = "Means, intervals and seeds as above."
    return Table("On held-out pairs", header, rows, note, is_numbers=True, columns=_defined([*shares, *others]))


def _heading(measure: Measure, found: Comparison) -> str:
    """Its name, with the number of items; where that differs, every cell says its own."""
    counts = {measure.num_items(variant) for variant in found.variants if measure.values(variant)}
    return f"{measure.name} (n\u00a0{counts.pop()})" if len(counts) == 1 else measure.name


def _is_known(measure: Measure, found: Comparison) -> bool:
    return any(measure.values(variant) for variant in found.variants)


def _defined(measures: Sequence[Measure]) -> dict[str, str]:
    return {measure.name: measure.axis for measure in measures}


def _in_order(found: Comparison) -> list[Variant]:
    """The best first, then those that could not be ranked."""
    return [*found.ranked, *(variant for variant in found.variants if variant not in found.ranked)]


def _places(found: Comparison) -> dict[int, float]:
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
        said[id(variant)] = format_value(sum(own) / len(own)) + _by_seeds(own, format_value)
    return said


def _share_cell(measure: Measure, variant: Variant, found: Comparison) -> str:
    values = measure.values(variant)
    if not values:
        return DASH
    bounds = interval(measure, variant)
    text = percent(measure.mean(variant))
    text += f" of {measure.num_items(variant)}" if _heading(measure, found) == measure.name else ""
    text += f"\n({points(bounds[0])} to {points(bounds[1])})" if bounds else ""
    return text + _by_seeds(values, points)


def _mean_cell(measure: Measure, variant: Variant) -> str:
    values = measure.values(variant)
    if not values:
        return DASH
    mean = sum(values) / len(values)
    error = 1.96 * sum(map(kl_error, variant.members)) / len(variant.members) if measure is KLS[0] else 0.0
    bounds = f"\n({_digits(mean - error)} to {_digits(mean + error)})" if error else ""
    return _digits(mean) + bounds + _by_seeds(values, _digits)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _by_seeds(values: Sequence[float], show: Callable[[float], str]) -> str:
    if len(values) == 1:
        return ""
    said = [show(value) for value in values]
    if len(set(said)) == 1:
        return "\nseeds alike"
    return (
        f"\nseeds {', '.join(said)}"
        if len(said) <= _SEEDS_IN_CELL
        else f"\nseeds {show(min(values))} to {show(max(values))}"
    )


def differences(found: Comparison) -> Table | None:
    """The best of each loss, or each setting of one loss, against the best of all."""
    standing = found.standing
    if standing is None or not standing.contrasts:
        return None
    measure, top = standing.measure, standing.best[0]
    rows = [[top.label, _share_cell(measure, top, found), DASH, "the first", DASH, DASH]]
    for contrast in standing.contrasts:
        d = contrast.difference
        rows.append(
            [
                contrast.other.label,
                _share_cell(measure, contrast.other, found),
                f"{points(d.value)} points\n({points(d.low)} to {points(d.high)})"
                + (f"\non {d.count} of {measure.num_items(top)}" if d.count < measure.num_items(top) else ""),
                judge_contrast(contrast),
                DASH if d.p is None else f"{d.better} to {d.worse}\nof {d.count}",
                _p(contrast.p),
            ]
        )
    one_loss = len({variant.loss for variant in standing.best}) == 1
    return Table(
        f"{'Every setting' if one_loss else 'The best setting of each loss'}, and how far it is behind",
        ["variant", _heading(measure, found), "behind the first", "in words", "better to worse", "p"],
        rows,
        "In parentheses 95% intervals. They and p say what other held-out items would change; what other seeds would, "
        "only the spread over seeds shows.",
        is_numbers=True,
        columns={
            "behind the first": "bootstrap over the items that both were asked, seeds averaged by item first; without "
            "such items, Newcombe's interval of the difference of two shares",
            "better to worse": f"on how many {measure.unit} the first did better than this one, and on how many worse; "
            "on all others they are level",
            "p": "exact sign test of these two numbers (McNemar's with one seed), adjusted after Holm for as many "
            "comparisons as there are rows below the first",
        },
    )


def head_to_head(found: Comparison) -> Table | None:
    """Win rates of each variant's answers against each other's."""
    variants = entrants(found)
    met = duels(variants)
    if not met:
        return None
    rows: list[list[str]] = []
    shades: list[list[float | None]] = []
    for i, variant in enumerate(variants):
        row, shade = [variant.label], []
        for j in range(len(variants)):
            duel, turned = met.get((min(i, j), max(i, j))), i > j
            row.append(_duel(duel, turned) if duel else DASH)
            shade.append((1 - duel.rate if turned else duel.rate) if duel else None)
        rows.append(row)
        shades.append(shade)
    return Table(
        "Answers against answers: how often the row's was better than the column's",
        ["variant", *(variant.label for variant in variants)],
        rows,
        "Share of prompts, ties as one half, with its 95% interval by the bootstrap over prompts; below, prompts won, "
        "tied and lost. Every seed of the one meets every seed of the other; seeds answer the same prompts and add "
        "no new ones. More than noise: the interval leaves out 50%, and p of the exact sign test, adjusted after Holm "
        f"for {len(met)} comparisons, is below 0.05"
        + ("; none of them is." if all(duel.is_noise for duel in met.values()) else "."),
        is_numbers=True,
        shades=shades,
    )


def _duel(duel: Duel, turned: bool) -> str:
    low, high = duel.bounds
    won, lost = duel.ahead.better, duel.ahead.worse
    rate = duel.rate
    if turned:
        rate, low, high, won, lost = 1 - rate, 1 - high, 1 - low, lost, won
    tied = duel.ahead.count - (won or 0) - (lost or 0)
    said = f"{percent(rate)}\n({points(low)} to {points(high)})\n{won} / {tied} / {lost}"
    return said if duel.is_noise else f"{said}\nmore than noise"


def _p(p: float | None) -> str:
    return DASH if p is None else "below 0.001" if p < 0.001 else f"{p:.3f}"


def settings_and_data(found: Comparison) -> Table:
    """What all members share, and where they do not, all that there is."""
    facts: dict[str, list[str]] = {}

    def add(name: str, value: Any) -> None:
        if value is not None and format_value(value) not in facts.setdefault(name, []):
            facts[name].append(format_value(value))

    for member in found.members:
        summary = member.run.summary
        add("recipe", summary.get("recipe"))
        add("model", member.settings.get("model.name", dig(summary, "model", "name")))
        add("quantisation", dig(summary, "model", "quantization"))
        for stage, prefix in (("sft", "sft.data"), ("preference", "data")):
            info = submapping(summary, "data", stage)
            title = "SFT data" if stage == "sft" else "preference data"
            if info:
                source, train, held_out = map(
                    format_value, (member.settings.get(f"{prefix}.source"), info.get("train"), info.get("eval"))
                )
                add(title, f"{source}: {train} to train on, {held_out} held out")
        add(
            "fingerprint of the preference data",
            _or_none(short_hash, dig(summary, "data", "preference", "fingerprint")),
        )
        if not member.is_stopped:
            add("steps of the preference stage", dig(summary, "stages", "preference", "steps"))
        add("seeds", member.seed)
        add("commit", summary.get("git_commit"))
        add("machine", dig(summary, "machine", "gpu") or dig(summary, "machine", "cpu"))
        add("torch", dig(summary, "versions", "torch"))
    for variant in found.variants:
        for member in variant.begun:
            fixed = {k: v for k, v in member.settings.items() if k.startswith("loss.") and k not in variant.settings}
            said = ", ".join(f"{key.removeprefix('loss.')} {format_value(value)}" for key, value in fixed.items())
            add(f"settings of {variant.loss.upper()} that do not differ", said or None)
    facts["what differs between members"] = [", ".join(found.differing_settings) or "nothing but the loss or the seed"]
    rows = [[name, "; ".join(values)] for name, values in facts.items() if values]
    return Table("Settings and data", ["", ""], rows)


def _or_none(show: Any, value: Any) -> Any:
    return None if value is None else show(value)


def member_table(found: Comparison) -> Table:
    """A row per member, with what it took."""
    labels = _labels(found)
    together = any(_together(member) > 1 for member in found.members)
    header = ["member", "variant", "seed", "status", "steps", "seconds", "tokens/s", "peak memory, MiB"]
    rows = []
    for member in found.members:
        stage = submapping(member.run.summary, "stages", "preference")
        memory = dig(stage, "memory", "measured")
        rows.append(
            [
                member.name,
                labels.get(member.name, member.loss.upper() or DASH),
                format_value(member.seed),
                status(member.run.summary) or "unfinished",
                format_value(stage.get("steps")),
                *(_digits(stage[k]) if is_number(stage.get(k)) else DASH for k in ("seconds", "tokens_per_second")),
                f"{memory / 2**20:,.0f}" if is_number(memory) else DASH,
                *([format_value(_together(member))] if together else []),
            ]
        )
    note = "Time, throughput and memory are those of the preference stage."
    if together:
        header.append("trained together")
        note += (
            " Members that trained together shared a process: its memory is that of all of them, and in their seconds "
            "the others trained too, so that tokens/s are a member's share of what the process did."
        )
    return Table("Members", header, rows, note)


def _labels(found: Comparison) -> dict[str, str]:
    return {member.name: variant.label for variant in found.variants for member in variant.begun}


def _together(member: ComparedRun) -> int:
    """How many members shared its process, itself among them."""
    return as_count(dig(member.run.summary, "cohort", "size")) or 1


def to_csv(found: Comparison) -> str:
    """A row per member with plain numbers, for spreadsheets and scripts."""
    measures = (*CRITERIA, RANKING_PER_TOKEN, MARGIN, DRIFT, WORDS)
    labels = _labels(found)
    header = ["member", "variant", "loss", *found.differing_settings, "seed", "status", "n_pairs", "n_answers"]
    header += [f"{m.name}{suffix}" for m in measures for suffix in (["", " low", " high"] if m.share else [""])]
    header += ["kl", "kl is", "seconds", "tokens_per_second", "peak_memory_bytes", "trained_together"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    drawn = kl_measure(found.members)
    for member in found.members:
        stage = submapping(member.run.summary, "stages", "preference")
        alone = Variant(member.loss, {}, [member])
        row: list[Any] = [member.name, labels.get(member.name), member.loss]
        row += [member.settings.get(key) for key in found.differing_settings]
        row += [member.seed, member.run.summary.get("status"), ACCURACY.count(member), CORRECT.count(member)]
        for measure in measures:
            row.append(measure.value(member))
            if measure.share:
                row += interval(measure, alone) or (None, None)
        row += [drawn.value(member) if drawn else None, drawn.name if drawn else None]
        row += [stage.get("seconds"), stage.get("tokens_per_second"), dig(stage, "memory", "measured")]
        row.append(_together(member))
        writer.writerow(row)
    return out.getvalue()
