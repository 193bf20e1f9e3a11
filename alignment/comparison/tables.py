"""The tables of a comparison, and its plain numbers as CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from alignment.comparison.head_to_head import Duel, Meeting, by_score, duels, entrants
from alignment.comparison.measures import (
    ACCURACY,
    CALIBRATION,
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
from alignment.comparison.needs import in_cell, need_of
from alignment.comparison.ranking import Comparison, interval
from alignment.comparison.sentences import counted, judge_contrast
from alignment.comparison.settings import named
from alignment.comparison.statistics import ranks
from alignment.losses import title as loss_title
from alignment.runs.folder import as_count, dig, status, stopped_at, submapping
from alignment.runs.text import DASH, format_value, is_number, percent, points, short_hash

_SEEDS_IN_CELL = 3
"""Up to this many seeds, a cell lists the value of each."""

_ABOUT_VALUES = (
    "Means over seeds, with the 95% interval in parentheses and the values of the single seeds below; n is the number "
    "of held-out items. Intervals are Wilson's, and Tango's for win rates with ties. More seeds do not narrow them, "
    "because every seed sees the same items."
)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of plain text; the first cell of a row is its heading.

    Attributes:
        columns: explanations of headings that need one.
        shades: a number in [0, 1] for each cell after the heading, which colours it; None for no colour.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""
    is_numbers: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    shades: list[list[float | None]] = field(default_factory=list)


def results(found: Comparison) -> Table:
    """A row per variant: its rank, what its answers are worth, and its distance from the reference."""
    measures = [m for m in (WIN_RATE, CORRECT, ACCURACY, found.rank_by) if m and _is_known(m, found)]
    measures = list(dict.fromkeys(sorted(measures, key=lambda measure: measure is not found.rank_by)))
    others = [m for m in (WORDS, kl_measure(found.members)) if m and _is_known(m, found)]
    rank_of, by_seed = _ranks(found), _ranks_by_seed(found)
    columns = {"rank": f"by {found.rank_by.axis}; equal variants share their mean rank"} if found.rank_by else {}
    columns |= _defined([*measures, *others])
    rows = []
    for variant in _in_order(found):
        row = [variant.label, "stopped" if not variant.members else format_value(rank_of.get(id(variant)))]
        row += [*(_share_cell(m, variant, found) for m in measures), *(_mean_cell(m, variant) for m in others)]
        row += [by_seed.get(id(variant), DASH)] if by_seed else []
        rows.append([*row, _seeds(variant)])
    header = ["variant", "rank", *(_heading(m, found) for m in measures), *(m.name for m in others)]
    if by_seed:
        header.append("rank by seed")
        columns["rank by seed"] = "mean rank among the runs of the same seed, and below it the rank for each seed"
    caption = "Losses and settings, the best first" if found.ranked else "Losses and settings"
    return Table(caption, [*header, "seeds"], rows, _ABOUT_VALUES, is_numbers=True, columns=columns)


def _seeds(variant: Variant) -> str:
    """The seeds that trained to the end, and below them those that were stopped early."""
    stopped = [f"{format_value(member.seed)} {stopped_at(member.run.summary)}" for member in variant.stopped]
    return "\n".join([", ".join(format_value(seed) for seed in variant.seeds), *stopped]).strip()


def held_out_pairs(found: Comparison) -> Table | None:
    """A row per variant: its log-probs of the held-out pairs. None if nothing of them is known."""
    shares = [m for m in (ACCURACY, OWN_ACCURACY, RANKING, RANKING_PER_TOKEN) if _is_known(m, found)]
    others = [m for m in (MARGIN, DRIFT, CALIBRATION) if _is_known(m, found)]
    if not shares and not others:
        return None
    rows = [
        [variant.label, *(_share_cell(m, variant, found) for m in shares), *(_mean_cell(m, variant) for m in others)]
        for variant in _in_order(found)
    ]
    header = ["variant", *(_heading(m, found) for m in shares), *(m.name for m in others)]
    note = "Means, intervals and seeds as in the table of losses and settings."
    return Table("On held-out pairs", header, rows, note, is_numbers=True, columns=_defined([*shares, *others]))


def _heading(measure: Measure, found: Comparison) -> str:
    """The measure's name with the number of items. If variants differ in that number, each cell has its own."""
    counts = {measure.num_items(variant) for variant in found.variants if measure.values(variant)}
    return f"{measure.name} (n\u00a0{counts.pop()})" if len(counts) == 1 else measure.name


def _is_known(measure: Measure, found: Comparison) -> bool:
    return any(measure.values(variant) for variant in found.variants)


def _defined(measures: Sequence[Measure]) -> dict[str, str]:
    return {measure.name: measure.axis for measure in measures}


def _in_order(found: Comparison) -> list[Variant]:
    """The ranked variants, the best first, then the others."""
    return [*found.ranked, *(variant for variant in found.variants if variant not in found.ranked)]


def _ranks(found: Comparison) -> dict[int, float]:
    values = [found.rank_by.mean(variant) or 0.0 for variant in found.ranked] if found.rank_by else []
    return {id(variant): rank for variant, rank in zip(found.ranked, ranks(values), strict=True)}


def _ranks_by_seed(found: Comparison) -> dict[int, str]:
    """Each variant's mean rank among the runs of the same seed, over the seeds that all variants have."""
    measure = found.rank_by
    if measure is None or not found.ranked:
        return {}
    values = pd.DataFrame(
        [
            {member.seed: value for member in variant.members if (value := measure.value(member)) is not None}
            for variant in found.ranked
        ]
    ).dropna(axis=1)
    if values.shape[1] < 2:
        return {}
    by_seed = values.rank(ascending=False)
    return {
        id(variant): format_value(sum(own) / len(own)) + _by_seeds(own, format_value)
        for variant, own in zip(found.ranked, by_seed.to_numpy().tolist(), strict=True)
    }


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
    if len(said) <= _SEEDS_IN_CELL:
        return f"\nseeds {', '.join(said)}"
    return f"\nseeds {show(min(values))} to {show(max(values))}"


def differences(found: Comparison) -> Table | None:
    """The variants that stand for the others, or each setting of a single loss, compared with the best of all."""
    standing = found.standing
    if standing is None or not standing.contrasts:
        return None
    measure, top = standing.measure, standing.best[0]
    rows = [[top.label, _share_cell(measure, top, found), DASH, "the first", DASH, DASH, DASH]]
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
                in_cell(need, measure.unit) if (need := need_of(standing, contrast)) else DASH,
            ]
        )
    what = "The best setting of each loss" + ("" if standing.is_of_losses else ", on-policy and offline")
    return Table(
        f"{'Every setting' if standing.is_of_settings else what}, and how far it is behind",
        ["variant", _heading(measure, found), "behind the first", "verdict", "better to worse", "p", "it would take"],
        rows,
        "95% intervals in parentheses. They and p say what other held-out items could change; only the spread over "
        "seeds says what other seeds could change.",
        is_numbers=True,
        columns={
            "behind the first": "mean difference, with a bootstrap interval over the items that both saw, seeds "
            "averaged by item; without common items, Newcombe's interval of the difference of two shares",
            "better to worse": f"number of {measure.unit} on which the first did better than this variant, and on "
            "which it did worse; on all others they are level",
            "p": "exact sign test of these two numbers (McNemar's test with one seed), Holm-adjusted for the number of "
            "rows below the first",
            "it would take": "so many in all, to tell a difference of the size observed with a power of 80%, at a "
            "two-sided level of 5% that is shared by the rows not told yet: items by Connor's formula for the sign "
            "test and the normal one for the mean, seeds by a paired t test over seeds",
        },
    )


def head_to_head(found: Comparison, meet: Meeting = by_score, whose: str = "", about: str = "") -> Table | None:
    """Win rates of each variant's answers against each other's. None if no two variants were judged.

    Args:
        whose: the judge, for the caption.
        about: what else the note says.
    """
    variants = entrants(found, meet)
    met = duels(variants, meet)
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
        f"Answers against answers{whose}: how often the row's answer beats the column's",
        ["variant", *(variant.label for variant in variants)],
        rows,
        "Share of prompts, a tie counting as half a win, with its 95% bootstrap interval over prompts; below, prompts "
        "won, tied and lost. Every seed of one variant meets every seed of the other; seeds answer the same prompts "
        'and add no new ones. "More than noise" means that the interval excludes 50% and that p of the exact sign '
        f"test, Holm-adjusted for {counted(len(met), 'comparison')}, is below 0.05"
        + ("; no pair reaches that." if all(duel.is_noise for duel in met.values()) else ".")
        + about,
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
    """What was run; a cell has several values where the runs differ."""
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
            if info:
                mixed = ", ".join(submapping(info, "sources"))
                named = f"a mixture of {mixed}" if mixed else member.settings.get(f"{prefix}.source")
                source, train, held_out = map(format_value, (named, info.get("train"), info.get("eval")))
                title = "SFT data" if stage == "sft" else "preference data"
                add(title, f"{source}: {train} to train on, {held_out} held out")
        if fingerprint := dig(summary, "data", "preference", "fingerprint"):
            add("fingerprint of the preference data", short_hash(fingerprint))
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
            add(f"settings that all {loss_title(variant.loss)} runs share", said or None)
    facts["what differs between members"] = [", ".join(found.differing_settings) or "nothing but the loss or the seed"]
    rows = [[name, "; ".join(values)] for name, values in facts.items() if values]
    return Table("Settings and data", ["", ""], rows)


def settings_left_out(found: Comparison) -> Table | None:
    """The values of settings that differ and that no name has. None without such settings."""
    left: dict[str, None] = {}
    for loss in dict.fromkeys(variant.loss for variant in found.variants):
        own = [variant.settings for variant in found.variants if variant.loss == loss]
        left |= dict.fromkeys(key for settings in own for key in settings if key not in named(own))
    rows = [[key, *(format_value(variant.settings.get(key)) for variant in found.variants)] for key in left]
    return (
        Table("What else differs", ["setting", *(variant.label for variant in found.variants)], rows) if rows else None
    )


def member_table(found: Comparison) -> Table:
    """A row per run: its variant, its status, its time and memory, and what it ends with after SFT alone."""
    labels = _labels(found)
    together = any(_together(member) > 1 for member in found.members)
    alone = any(_sft_loss(member) is not None for member in found.members)
    header = ["member", "variant", "seed", "status", "steps", "seconds", "tokens/s", "peak memory, MiB"]
    header += ["held-out SFT loss"] if alone else []
    rows = []
    for member in found.members:
        stage = _last_stage(member)
        memory = dig(stage, "memory", "measured")
        rows.append(
            [
                member.name,
                labels.get(member.name, loss_title(member.loss) or DASH),
                format_value(member.seed),
                status(member.run.summary) or "unfinished",
                format_value(stage.get("steps")),
                *(_digits(stage[k]) if is_number(stage.get(k)) else DASH for k in ("seconds", "tokens_per_second")),
                f"{memory / 2**20:,.0f}" if is_number(memory) else DASH,
                *([format_value(_sft_loss(member))] if alone else []),
                *([format_value(_together(member))] if together else []),
            ]
        )
    note = "Time, throughput and memory are those of the preference stage, or of an SFT stage that is alone."
    if together:
        header.append("trained together")
        note += (
            " Members that trained together shared one process: the memory is that of the whole process, the seconds "
            "include the training of the others, and tokens/s are a member's share."
        )
    return Table("Members", header, rows, note)


def _last_stage(member: ComparedRun) -> dict[str, Any]:
    return submapping(member.run.summary, "stages", "preference" if member.loss else "sft")


def _sft_loss(member: ComparedRun) -> float | None:
    """The loss of the held-out conversations after SFT alone."""
    return None if member.loss else dig(_last_stage(member), "metrics", "eval/loss")


def _labels(found: Comparison) -> dict[str, str]:
    return {member.name: variant.label for variant in found.variants for member in variant.begun}


def _together(member: ComparedRun) -> int:
    """Number of members that shared the process, itself included."""
    return as_count(dig(member.run.summary, "cohort", "size")) or 1


def to_csv(found: Comparison) -> str:
    """A row per run with plain numbers, for spreadsheets and scripts."""
    measures = (*CRITERIA, RANKING_PER_TOKEN, MARGIN, DRIFT, CALIBRATION, WORDS)
    labels, distance = _labels(found), kl_measure(found.members)
    rows = []
    for member in found.members:
        stage = _last_stage(member)
        row: dict[str, Any] = {"member": member.name, "variant": labels.get(member.name), "loss": member.loss}
        row |= {key: member.settings.get(key) for key in found.differing_settings}
        row |= {"seed": member.seed, "status": member.run.summary.get("status")}
        row |= {"n_pairs": ACCURACY.count(member), "n_answers": CORRECT.count(member)}
        for measure in measures:
            row[measure.name] = measure.value(member)
            if measure.share:
                bounds = interval(measure, Variant(member.loss, {}, [member])) or (None, None)
                row |= dict(zip((f"{measure.name} low", f"{measure.name} high"), bounds, strict=True))
        row |= {"held-out SFT loss": _sft_loss(member)}
        row |= {"kl": distance.value(member) if distance else None, "kl is": distance.name if distance else None}
        row |= {key: stage.get(key) for key in ("seconds", "tokens_per_second")}
        row |= {"peak_memory_bytes": dig(stage, "memory", "measured"), "trained_together": _together(member)}
        rows.append(row)
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")
