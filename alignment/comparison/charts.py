"""The charts of a comparison, as Plotly figures that the page draws."""

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
from alignment.runs.folder import dig, series
from alignment.runs.text import format_value, is_number

COLOURS = ("#3b82d6", "#d2622a", "#2f9e6e", "#b35fc4", "#a8820f", "#d6457f", "#4f93a6", "#8577d8")
"""Of losses, or of variants where there is one loss: each has a contrast of 3 or more to white and to the dark page."""

GLANCE = "At a glance"
"""The charts that the page begins with."""
CURVES = "Curves"
"""The charts of this name share a legend."""
_WINDOW = 5
"""Training steps that a point of a curve is the mean of: a step alone has few pairs."""
_SHOWN_AT_FIRST = 6
"""As many variants are told apart at a glance."""
_MAX_LEGEND = 12
"""As many fit into a legend."""
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_STROKES = ("", "8 5", "2 4", "8 4 2 4", "14 5", "14 4 2 4")
"""The same dashes in SVG."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")

_METRICS = (
    ("Margin against the reference", "log-ratio, chosen - rejected (nats)", "nats/margins"),
    ("Reward accuracy, by the log-ratio to the reference", "share of pairs ranked rightly", "nats/accuracies"),
    ("Accuracy of the loss's own reward", "share of pairs ranked rightly", "rewards/accuracies"),
    ("Ranking accuracy, by the log-prob of the policy alone", "share of pairs ranked rightly", "ranking/accuracies"),
    ("Log-prob of chosen completions", "log-prob (nats)", "logps/chosen"),
    ("Log-prob of rejected completions", "log-prob (nats)", "logps/rejected"),
    ("Offline log-ratio to the reference", "mean log-ratio (nats)", "kl/offline"),
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
        """Of its legend, for which the page needs space."""
        return sum(trace.get("showlegend", True) for trace in self.figure["data"])


def charts(found: Comparison) -> dict[str, list[Chart]]:
    """All that can be drawn, by what it is about."""
    groups = {
        GLANCE: overviews(found),
        "Gain and distance from the reference": frontiers(found),
        "Sensitivity to settings": sensitivity(found),
        CURVES: [*curves(found), *lengths(found)],
    }
    return {title: drawn for title, drawn in groups.items() if drawn}


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A variant in the legend that charts share, with which it is shown in them or not."""

    label: str
    colour: str
    dashes: str
    is_shown: bool


def library() -> str:
    """The JavaScript that draws the figures."""
    return str(get_plotlyjs())


def _style(found: Comparison, variant: Variant) -> tuple[str, int]:
    """Its colour, and which of the variants with that colour it is."""
    losses = list(dict.fromkeys(v.loss for v in found.variants))
    if len(losses) == 1:
        place = found.variants.index(variant)
        return COLOURS[place % len(COLOURS)], place // len(COLOURS)
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
    """Plotly reads a few tags in its texts."""
    return html.escape(text.encode("utf-8", "replace").decode(), quote=False)


def legend(found: Comparison) -> list[LegendEntry]:
    """The legend of the curves; where there are many variants, the best of each loss are shown at first."""
    few = found.variants if len(found.variants) <= _SHOWN_AT_FIRST or not found.best else found.best[:_SHOWN_AT_FIRST]
    known = []
    for variant in found.variants:
        colour, number = _style(found, variant)
        known.append(LegendEntry(variant.label, colour, _STROKES[number % len(_STROKES)], variant in few))
    return known


def _line(found: Comparison, variant: Variant, member: ComparedRun, size: int, hover: str) -> dict[str, Any]:
    """How a member's line looks, and what it says where it is pointed at."""
    colour, number = _style(found, variant)
    label = _safe(variant.label)
    return {
        "mode": "lines+markers",
        "name": label,
        "meta": found.variants.index(variant),  # its place in the legend that charts share
        "legendgroup": label,
        "line": {"color": colour, "dash": _DASHES[number % len(_DASHES)], "width": 2},
        "marker": {"size": size, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
        "hovertemplate": f"<b>{label}</b>, seed {_safe(format_value(member.seed))}{hover}<extra></extra>",
    }


def _name_once(figure: go.Figure) -> None:
    """One entry of the legend for the lines of a variant."""
    named: set[str] = set()
    for line in figure.data:
        line.showlegend = line.name not in named
        named.add(line.name)


def curves(found: Comparison) -> list[Chart]:
    """A chart per metric with a line per member."""
    drawn = []
    for title, axis, metric in _METRICS:
        figure, split = go.Figure(), _split(found, metric)
        where = "held-out pairs" if split == "eval" else f"training pairs, mean of the last {_WINDOW} steps"
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
            note = f"A line is a member; seeds of a variant look alike. Over {where}"
            note += ", since held-out ones were looked at too seldom for a curve." if split == "train" else "."
            there = {line.meta for line in figure.data}
            absent = {v.loss.upper(): None for place, v in enumerate(found.variants) if place not in there}
            note += f" Not measured of {', '.join(absent)}." if absent else ""
            if any(member.run.has_gaps and member.run.metrics for member in found.members):
                note += " A line with lost metrics lacks points; they are named at the end of the page."
            if metric.endswith("accuracies"):
                figure.update_yaxes(tickformat=".0%")
            if any(variant.stopped for variant in found.variants):
                note += " A line that ends before the others is that of a member that was stopped early."
            x = "optimizer step of the preference stage"
            drawn.append(_chart(metric.replace("/", "-"), title, note, figure, x, axis))
    return drawn


def _trailing(values: Sequence[float]) -> list[float]:
    """The mean of each value with those before it, up to `_WINDOW` of them."""
    windows = [values[max(0, i - _WINDOW + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _split(found: Comparison, metric: str) -> str:
    """Held-out values, unless they are no curve and those of training are."""
    points = {
        split: max(
            (len(series(member.run.metrics, "preference", split, metric)[0]) for member in found.members), default=0
        )
        for split in ("eval", "train")
    }
    return "eval" if points["eval"] > 2 or points["eval"] >= points["train"] else "train"


def lengths(found: Comparison) -> list[Chart]:
    """Mean lengths of answers before, between and after the stages."""
    figure = go.Figure()
    moments = {"start": "before training", "sft": "after SFT", "final": "final"}
    for variant in found.variants:
        for member in variant.members:
            words = {
                title: dig(member.run.summary, "evaluation", "answers", m, "words") for m, title in moments.items()
            }
            values = {title: value for title, value in words.items() if is_number(value)}
            if values:
                look = _line(found, variant, member, 7, "<br>%{x}: %{y:.3g} words")
                figure.add_scatter(x=list(values), y=list(values.values()), **look)
    _name_once(figure)
    if not figure.data:
        return []
    note = "A judge may favour long answers, or short ones: part of a win may be nothing else."
    return [_chart("lengths", "Length of answers", note, figure, "", "words per answer (mean)")]


def _ranked_by(found: Comparison) -> list[Measure]:
    """What variants are ranked by, and reward accuracy, where they are known."""
    measures = [measure for measure in (found.rank_by, ACCURACY) if measure is not None]
    return [m for m in dict.fromkeys(measures) if any(m.values(variant) for variant in found.variants)]


def overviews(found: Comparison) -> list[Chart]:
    """Every variant with its interval and its seeds, a row for each, the best on top."""
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
            f"Large points are means over seeds, with their 95% intervals; small ones are seeds. Across: {measure.axis}"
        )
        note += "; the dotted line is a draw." if measure is WIN_RATE else "."
        title = measure.name.capitalize()
        drawn.append(_chart(f"glance-{_slug(measure.name)}", title, note, figure, measure.name, ""))
    return drawn


def frontiers(found: Comparison) -> list[Chart]:
    """What was won for how much distance from the reference, by what is ranked by and by reward accuracy."""
    distance = kl_measure(found.members)
    drawn = [_frontier(found, measure, distance) for measure in _ranked_by(found)] if distance else []
    return [chart for chart in drawn if chart is not None]


def _frontier(found: Comparison, measure: Measure, distance: Measure) -> Chart | None:
    """A point per variant with the intervals of both values, and a faint one per seed."""
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
        look = {"symbol": _SYMBOLS[number % len(_SYMBOLS)], "color": colour}
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
    note = f"A large point is a variant, {'its bars the' if has_error else 'its bar the'} 95% interval"
    note += f"{'s' if has_error else ''}; small ones are its seeds. Across: {distance.axis}. Better is higher, and as "
    note += "near to the reference as can be. "
    if len(found.variants) <= _MAX_LEGEND:
        note += "A click on the legend hides a variant, two show it alone."
    else:
        note += "Who a point is, it says where it is pointed at."
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
    """What was ranked by over each number that differs between variants of one loss; all with the same heights."""
    measure = found.rank_by
    if measure is None:
        return []
    losses = list(dict.fromkeys(variant.loss for variant in found.ranked))
    asked = [(loss, key) for key in found.differing_settings for loss in losses]
    figures = {places: figure for places in asked if (figure := _over(found, measure, *places)).data}
    heights = [y for v in found.ranked for y in (*measure.values(v), *(interval(measure, v) or ()))]
    drawn = []
    for (loss, key), figure in figures.items():
        numbers = sorted({x for line in figure.data for x in line.x})
        ticks = {"tickvals": numbers, "ticktext": [format_value(x) for x in numbers]}
        figure.update_xaxes(ticks | ({"type": "log"} if numbers[0] > 0 and numbers[-1] / numbers[0] >= 4 else {}))
        figure.update_yaxes(tickformat=".0%", range=[min(heights) - 0.02, max(heights) + 0.02])
        figure.update_layout(height=280 if all(line.showlegend is False for line in figure.data) else None)
        name = key.removeprefix("loss.")
        note = "The line joins means over seeds, with their 95% intervals; small points are seeds."
        title = f"{loss.upper()}: {name}"
        drawn.append(_chart(f"over-{_slug(f'{loss} {key}')}", title, note, figure, name, measure.name))
    return drawn


def _over(found: Comparison, measure: Measure, loss: str, key: str) -> go.Figure:
    """A line for each group of variants of a loss that differ in this setting alone."""
    figure = go.Figure()
    lines: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in found.variants:
        if variant.loss == loss and is_number(variant.settings.get(key)) and measure.values(variant):
            others = {k: v for k, v in variant.settings.items() if k != key}
            lines.setdefault(tuple(others.items()), []).append(variant)
    groups = [group for group in lines.values() if len(group) > 1]
    for number, group in enumerate(groups):
        others = {k: v for k, v in group[0].settings.items() if k != key}
        label = _safe(Variant(loss, others, []).label)
        colour = COLOURS[number % len(COLOURS)] if len(groups) > 1 else _style(found, group[0])[0]
        name = _safe(key.removeprefix("loss."))
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
            marker={"size": 7, "opacity": 0.45, "color": colour, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
            text=[_safe(format_value(seed)) for _, _, seed in seeds],
            hovertemplate=f"<b>{label}</b>, seed %{{text}}<br>{name} %{{x}}: %{{y:.1%}}<extra></extra>",
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
            marker={"size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
            hovertemplate=f"<b>{label}</b><br>{name} %{{x}}: %{{y:.1%}}<extra></extra>",
        )
    return figure
