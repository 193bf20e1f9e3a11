"""The tables of a comparison, before they are a page, and its numbers for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.comparison.measures import (
    ACCURACY,
    CORRECT,
    CRITERIA,
    DRIFT,
    MARGIN,
    RANKING_PER_TOKEN,
    WORDS,
    Measure,
    kl,
)
from alignment.comparison.members import Variant
from alignment.comparison.ranking import Comparison, interval
from alignment.comparison.sentences import judged, points
from alignment.comparison.statistics import ranks
from alignment.run_folder import NONE, get, percent, section, short, shown


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are plain text; the first of a row is its heading."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    is_numbers: bool = False


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
    text += f"\n({points(found[0])} to {points(found[1])})" if found else ""
    return text + _by_seeds(values, points)


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
                f"{points(d.value)} points ({points(d.low)} to {points(d.high)})",
                how,
                _p(against.p),
                judged(against),
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
