"""The charts of a comparison, as Plotly figures."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from alignment.comparison.measures import ACCURACY, KLS, WIN_RATE, Measure, kl_error, kl_measure
from alignment.comparison.members import ComparedRun, Variant
from alignment.comparison.ranking import Comparison, in_rank_order, interval
from alignment.comparison.settings import names, told
from alignment.losses import title as loss_title
from alignment.runs.folder import MODEL_TITLES, by_round, dig, series
from alignment.runs.style import COLOURS, DASHES, STROKES, SYMBOLS
from alignment.runs.text import format_value, is_number

GLANCE = "At a glance"
"""Title of the charts at the top of the page."""

CURVES = "Curves"
"""Title of the charts that share a legend."""

_WINDOW = 5
"""A point of a training curve is the mean of this many steps, because one step has few pairs."""

_SHOWN_AT_FIRST = 6
"""Variants that the curves show when the page opens."""

_MAX_LEGEND = 12
"""Variants that fit into a legend."""

_METRICS = (
    ("Margin over the reference", "log-ratio, chosen - rejected (nats)", "nats/margins"),
    ("Reward accuracy, by the log-ratio to the reference", "share of pairs ranked correctly", "nats/accuracies"),
    ("Accuracy of the loss's own reward", "share of pairs ranked correctly", "rewards/accuracies"),
    ("Ranking accuracy, by the log-prob of the policy alone", "share of pairs ranked correctly", "ranking/accuracies"),
    ("Log-prob of chosen completions", "log-prob (nats)", "logps/chosen"),
    ("Log-prob of rejected completions", "log-prob (nats)", "logps/rejected"),
    ("Offline log-ratio to the reference", "mean log-ratio (nats)", "kl/offline"),
    ("Score of held-out answers", "judge's score (mean)", "answers/score"),
    ("Win rate of held-out answers against the start of the stage", "share, ties half", "answers/win_rate"),
)


_ROUNDS = (
    ("Score of a round's answers", "judge's score, mean of all answers", "onpolicy/score_mean"),
    ("Best score of each prompt in a round", "judge's score, mean of the best answers", "onpolicy/score_best"),
    ("Informative prompts of a round", "share of prompts with something to train on", "onpolicy/informative"),
    ("Length of a round's answers", "tokens per answer (mean)", "onpolicy/length_mean"),
    ("KL to the start of the stage, at each round", "nats per answer", "onpolicy/kl_start"),
    ("Staleness at the end of a round", "log-prob now - when drawn (nats per token)", "onpolicy/staleness"),
    ("Answers that still count at the end of a round", "effective share of the answers", "onpolicy/effective"),
)


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure; `figure` is its data and layout for Plotly."""

    name: str
    title: str
    note: str
    figure: dict[str, Any]

    @property
    def num_entries(self) -> int:
        """Number of entries in its legend, for which the page makes space."""
        return sum(trace.get("showlegend", True) for trace in self.figure["data"])


def charts(found: Comparison) -> dict[str, list[Chart]]:
    """All charts by the title of their section; sections without charts are left out."""
    groups = {
        GLANCE: overviews(found),
        "Gain and distance from the reference": frontiers(found),
        "Sensitivity to settings": sensitivity(found),
        CURVES: [*curves(found), *rounds(found), *lengths(found)],
    }
    return {title: drawn for title, drawn in groups.items() if drawn}


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A variant in the shared legend. Its box shows or hides the variant's lines in all charts."""

    label: str
    colour: str
    dashes: str
    is_shown: bool


def library() -> str:
    """The JavaScript that draws the figures."""
    return str(get_plotlyjs())


def _style(found: Comparison, variant: Variant) -> tuple[str, int]:
    """The variant's colour, and its index among the variants with that colour."""
    losses = list(dict.fromkeys(v.loss for v in found.variants))
    if len(losses) == 1:
        index = found.variants.index(variant)
        return COLOURS[index % len(COLOURS)], index // len(COLOURS)
    same = [v for v in found.variants if v.loss == variant.loss]
    return COLOURS[losses.index(variant.loss) % len(COLOURS)], same.index(variant)


def _chart(name: str, title: str, note: str, figure: go.Figure, x: str, y: str) -> Chart:
    figure.update_layout(
        xaxis_title={"text": x, "standoff": 6},
        yaxis_title={"text": y, "standoff": 6},
        margin={"l": 60, "r": 16, "t": 16, "b": 48},
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "xref": "container", "x": 0},
        hovermode="closest",
        hoverlabel={"align": "left", "namelength": -1},
        template="none",
    )
    return Chart(name, title, note, json.loads(figure.to_json()))


def _safe(text: str) -> str:
    """Escape a text: Plotly would read some tags in it."""
    return html.escape(text.encode("utf-8", "replace").decode(), quote=False)


def legend(found: Comparison) -> list[LegendEntry]:
    """The shared legend. With many variants, only the best of each loss are shown at first."""
    few = found.variants if len(found.variants) <= _SHOWN_AT_FIRST or not found.best else found.best[:_SHOWN_AT_FIRST]
    known = []
    for variant in found.variants:
        colour, number = _style(found, variant)
        known.append(LegendEntry(variant.label, colour, STROKES[number % len(STROKES)], variant in few))
    return known


def _line(found: Comparison, variant: Variant, member: ComparedRun, size: int, hover: str) -> dict[str, Any]:
    """The look of a run's line, and its text under the pointer."""
    colour, number = _style(found, variant)
    label = _safe(variant.label)
    return {
        "mode": "lines+markers",
        "name": label,
        "meta": found.variants.index(variant),  # its index in the shared legend
        "legendgroup": label,
        "line": {"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2},
        "marker": {"size": size, "symbol": SYMBOLS[number % len(SYMBOLS)]},
        "hovertemplate": f"<b>{label}</b>, seed {_safe(format_value(member.seed))}{hover}<extra></extra>",
    }


def _name_once(figure: go.Figure) -> None:
    """Give the lines of a variant one common legend entry."""
    named: set[str] = set()
    for line in figure.data:
        line.showlegend = line.name not in named
        named.add(line.name)


def curves(found: Comparison) -> list[Chart]:
    """A chart per metric, with a line per run."""
    drawn = []
    for title, axis, metric in _METRICS:
        figure, split = go.Figure(), _split(found, metric)
        where = "held-out pairs" if split == "eval" else f"training pairs, mean of the last {_WINDOW} steps"
        where = "answers to held-out prompts" if metric.startswith("answers/") else where
        for variant in found.variants:
            for member in variant.begun:
                steps, values = series(member.run.metrics, "preference", split, metric)
                if split == "train":
                    values = _trailing(values)
                if steps:
                    look = _line(found, variant, member, 5, f", {where}<br>step %{{x}}: %{{y:.3g}}")
                    figure.add_scatter(x=steps, y=values, **look)
        _name_once(figure)
        if figure.data:
            note = f"One line per member; the seeds of a variant look alike. Values are of {where}"
            note += ", because held-out pairs were evaluated too rarely for a curve." if split == "train" else "."
            there = {line.meta for line in figure.data}
            absent = {loss_title(v.loss): None for index, v in enumerate(found.variants) if index not in there}
            note += f" Not measured for {', '.join(absent)}." if absent else ""
            if metric.endswith(("accuracies", "win_rate")):
                figure.update_yaxes(tickformat=".0%")
            if any(variant.stopped for variant in found.variants):
                note += " A line that ends early belongs to a member that was stopped early."
            x = "optimizer step of the preference stage"
            drawn.append(_chart(metric.replace("/", "-"), title, note, figure, x, axis))
    return drawn


def rounds(found: Comparison) -> list[Chart]:
    """A chart per metric of on-policy rounds, with a line per run that has them."""
    drawn, note = [], "One line per member that trains in rounds, on answers of its own."
    for title, axis, metric in _ROUNDS:
        figure = go.Figure()
        for variant in found.variants:
            for member in variant.begun:
                if values := by_round(member.run.metrics, metric):
                    look = _line(found, variant, member, 6, "<br>round %{x}: %{y:.3g}")
                    figure.add_scatter(x=list(values), y=list(values.values()), **look)
        _name_once(figure)
        if figure.data:
            figure.update_xaxes(dtick=-(-max(max(line.x) for line in figure.data) // 10))
            if metric.endswith(("informative", "effective")):
                figure.update_yaxes(tickformat=".0%")
            drawn.append(_chart(re.sub("[/_]", "-", metric), title, note, figure, "round", axis))
    return drawn


def _trailing(values: Sequence[float]) -> list[float]:
    """The mean of each value and the values before it, up to `_WINDOW` of them."""
    windows = [values[max(0, i - _WINDOW + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _split(found: Comparison, metric: str) -> str:
    """The split to draw: "eval", unless it has too few points for a curve and "train" has more."""
    points = {
        split: max(
            (len(series(member.run.metrics, "preference", split, metric)[0]) for member in found.members), default=0
        )
        for split in ("eval", "train")
    }
    return "eval" if points["eval"] > 2 or points["eval"] >= points["train"] else "train"


def lengths(found: Comparison) -> list[Chart]:
    """Mean length of the answers before training and after each stage."""
    figure = go.Figure()
    for variant in found.variants:
        for member in variant.members:
            words = {
                title: dig(member.run.summary, "evaluation", "answers", model, "words")
                for model, title in MODEL_TITLES.items()
            }
            values = {title: value for title, value in words.items() if is_number(value)}
            if values:
                look = _line(found, variant, member, 7, "<br>%{x}: %{y:.3g} words")
                figure.add_scatter(x=list(values), y=list(values.values()), **look)
    _name_once(figure)
    if not figure.data:
        return []
    note = "A judge may favour long or short answers, so length may explain part of a win."
    return [_chart("lengths", "Length of answers", note, figure, "", "words per answer (mean)")]


def _ranked_by(found: Comparison) -> list[Measure]:
    """The measure that ranks the variants, and reward accuracy, if known."""
    measures = [measure for measure in (found.rank_by, ACCURACY) if measure is not None]
    return [m for m in dict.fromkeys(measures) if any(m.values(variant) for variant in found.variants)]


def overviews(found: Comparison) -> list[Chart]:
    """A row per variant with its interval and its seeds, the best on top."""
    drawn = []
    for measure in _ranked_by(found):
        figure = go.Figure()
        for variant in in_rank_order(found.variants, measure):
            colour, label = _style(found, variant)[0], _safe(variant.label)
            seeds = [(member, y) for member in variant.members if (y := measure.value(member)) is not None]
            if len(seeds) > 1:
                figure.add_scatter(
                    x=[value for _, value in seeds],
                    y=[label] * len(seeds),
                    mode="markers",
                    marker={"size": 7, "opacity": 0.45, "color": colour},
                    text=[_safe(format_value(member.seed)) for member, _ in seeds],
                    hovertemplate=f"<b>{label}</b>, seed %{{text}}<br>%{{x:.1%}}<extra></extra>",
                )
            mean = measure.mean(variant) or 0.0
            figure.add_scatter(
                x=[mean],
                y=[label],
                error_x=_bars([mean], [interval(measure, variant) or (mean, mean)], colour),
                mode="markers",
                marker={"size": 11, "color": colour},
                hovertemplate=f"<b>{label}</b><br>%{{x:.1%}}<extra></extra>",
            )
        if measure is WIN_RATE:
            figure.add_vline(x=0.5, line={"dash": "dot", "width": 1, "color": "#8a939c"})
        figure.update_xaxes(tickformat=".0%")
        figure.update_yaxes(autorange="reversed", type="category")
        figure.update_traces(showlegend=False)
        figure.update_layout(height=110 + 28 * len({line.y[0] for line in figure.data}))
        note = (
            f"Large points are means over seeds with 95% intervals, small ones single seeds. Horizontal: {measure.axis}"
        )
        note += "; the dotted line is a draw." if measure is WIN_RATE else "."
        title = measure.name.capitalize()
        drawn.append(_chart(f"glance-{_slug(measure.name)}", title, note, figure, measure.name, ""))
    return drawn


def frontiers(found: Comparison) -> list[Chart]:
    """Gain over distance from the reference, for the ranking measure and for reward accuracy."""
    distance = kl_measure(found.members)
    drawn = [_frontier(found, measure, distance) for measure in _ranked_by(found)] if distance else []
    return [chart for chart in drawn if chart is not None]


def _frontier(found: Comparison, measure: Measure, distance: Measure) -> Chart | None:
    """A point per variant with the intervals of both values, and a faint point per seed."""
    figure = go.Figure()
    has_error = distance is KLS[0]
    for variant in found.variants:
        colour, number = _style(found, variant)
        known = [
            (member, x, y)
            for member in variant.members
            if (x := distance.value(member)) is not None and (y := measure.value(member)) is not None
        ]
        if not known:
            continue
        whole = Variant(variant.loss, variant.settings, [member for member, _, _ in known])
        x, y = (sum(values) / len(known) for values in zip(*((x, y) for _, x, y in known), strict=True))
        error = 1.96 * sum(kl_error(member) for member, _, _ in known) / len(known)
        look = {"symbol": SYMBOLS[number % len(SYMBOLS)], "color": colour}
        if len(known) > 1:
            figure.add_scatter(
                x=[x for _, x, _ in known],
                y=[y for _, _, y in known],
                mode="markers",
                name=_safe(variant.label),
                legendgroup=_safe(variant.label),
                showlegend=False,
                marker=look | {"size": 7, "opacity": 0.45},
                text=[_safe(f"{variant.label}, seed {format_value(member.seed)}") for member, _, _ in known],
                hovertemplate="<b>%{text}</b><br>%{y:.1%} at %{x:.3g} nats<extra></extra>",
            )
        figure.add_scatter(
            x=[x],
            y=[y],
            error_x=_bars([x], [(x - error, x + error)], colour) | {"visible": has_error},
            error_y=_bars([y], [interval(measure, whole) or (y, y)], colour),
            mode="markers",
            name=_safe(variant.label),
            legendgroup=_safe(variant.label),
            showlegend=len(found.variants) <= _MAX_LEGEND,
            marker=look | {"size": 11},
            hovertemplate=f"<b>{_safe(variant.label)}</b><br>%{{y:.1%}} at %{{x:.3g}} nats<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_yaxes(tickformat=".0%")
    note = f"Large points are variants with 95% intervals, small ones their seeds. Horizontal: {distance.axis}. Higher "
    note += "is better, and so is nearer to the reference. "
    if len(found.variants) <= _MAX_LEGEND:
        note += "Click a legend entry to hide a variant; double-click it to see that variant alone."
    else:
        note += "Point at a mark to see its variant."
    title = f"{measure.name.capitalize()} against distance"
    return _chart(f"frontier-{_slug(measure.name)}", title, note, figure, distance.name, measure.name)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")


def _bars(values: Sequence[float], bounds: Sequence[tuple[float, float]], colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for value, (_, high) in zip(values, bounds, strict=True)],
        "arrayminus": [value - low for value, (low, _) in zip(values, bounds, strict=True)],
        "color": colour,
        "thickness": 1.2,
        "width": 4,
    }


def sensitivity(found: Comparison) -> list[Chart]:
    """The ranking measure over each numeric setting that a loss was tried with. All charts share a vertical range."""
    measure = found.rank_by
    if measure is None:
        return []
    losses = list(dict.fromkeys(variant.loss for variant in found.ranked))
    asked = [(loss, key) for key in found.differing_settings for loss in losses]
    figures = {pair: figure for pair in asked if (figure := _over(found, measure, *pair)).data}
    heights = [y for v in found.ranked for y in (*measure.values(v), *(interval(measure, v) or ()))]
    drawn = []
    for (loss, key), figure in figures.items():
        numbers = sorted({x for line in figure.data for x in line.x})
        ticks = {"tickvals": numbers, "ticktext": [format_value(x) for x in numbers]}
        figure.update_xaxes(ticks | ({"type": "log"} if numbers[0] > 0 and numbers[-1] / numbers[0] >= 4 else {}))
        figure.update_yaxes(tickformat=".0%", range=[min(heights) - 0.02, max(heights) + 0.02])
        figure.update_layout(height=280 if all(line.showlegend is False for line in figure.data) else None)
        name = key.removeprefix("loss.")
        note = "Lines join means over seeds with 95% intervals; small points are single seeds."
        title = f"{loss_title(loss)}: {name}"
        drawn.append(_chart(f"over-{_slug(f'{loss} {key}')}", title, note, figure, name, measure.name))
    return drawn


def _over(found: Comparison, measure: Measure, loss: str, key: str) -> go.Figure:
    """A line for each group of variants that differ in this setting alone."""
    figure = go.Figure()
    lines: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in found.variants:
        if variant.loss == loss and is_number(variant.settings.get(key)) and measure.values(variant):
            values = tuple((k, told(v)) for k, v in variant.settings.items() if k != key)
            lines.setdefault(values, []).append(variant)
    groups = [group for group in lines.values() if len(group) > 1]
    others = [(loss, {k: v for k, v in group[0].settings.items() if k != key}) for group in groups]
    for number, (group, name) in enumerate(zip(groups, names(others), strict=True)):
        label = _safe(name)
        colour = COLOURS[number % len(COLOURS)] if len(groups) > 1 else _style(found, group[0])[0]
        setting = _safe(key.removeprefix("loss."))
        seeds = [
            (v.settings[key], value, m.seed)
            for v in group
            for m in v.members
            if (value := measure.value(m)) is not None
        ]
        figure.add_scatter(
            x=[x for x, _, _ in seeds],
            y=[y for _, y, _ in seeds],
            mode="markers",
            name=label,
            legendgroup=label,
            showlegend=False,
            marker={"size": 7, "opacity": 0.45, "color": colour, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            text=[_safe(format_value(seed)) for _, _, seed in seeds],
            hovertemplate=f"<b>{label}</b>, seed %{{text}}<br>{setting} %{{x}}: %{{y:.1%}}<extra></extra>",
        )
        means = [measure.mean(variant) or 0.0 for variant in group]
        bounds = [interval(measure, variant) or (mean, mean) for variant, mean in zip(group, means, strict=True)]
        figure.add_scatter(
            x=[variant.settings[key] for variant in group],
            y=means,
            error_y=_bars(means, bounds, colour),
            mode="lines+markers",
            name=label,
            legendgroup=label,
            showlegend=len(groups) > 1,
            line={"color": colour, "width": 2},
            marker={"size": 9, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            hovertemplate=f"<b>{label}</b><br>{setting} %{{x}}: %{{y:.1%}}<extra></extra>",
        )
    return figure
