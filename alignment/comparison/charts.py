"""The charts of a comparison, as Plotly figures: those with points for variants, and the sections of all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from alignment.comparison.curves import curves, lengths, rounds
from alignment.comparison.drawing import SHARE, Chart, as_chart, in_lines, safe, style
from alignment.comparison.measures import ACCURACY, KLS, WIN_RATE, Measure, kl_error, kl_measure
from alignment.comparison.members import Variant
from alignment.comparison.ranking import Comparison, in_rank_order, interval
from alignment.comparison.settings import names, told
from alignment.losses import title as loss_title
from alignment.runs.style import COLOURS, STROKES, SYMBOLS
from alignment.runs.text import format_value, is_number

GLANCE = "At a glance"
"""Title of the charts at the top of the page."""

CURVES = "Curves"
"""Title of the charts that share a legend."""

_SHOWN_AT_FIRST = 6
"""Variants that the curves show when the page opens."""

_MAX_LEGEND = 12
"""Variants that fit into a legend."""


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


def legend(found: Comparison) -> list[LegendEntry]:
    """The shared legend. With many variants, only the best of each loss are shown at first."""
    few = found.variants if len(found.variants) <= _SHOWN_AT_FIRST or not found.best else found.best[:_SHOWN_AT_FIRST]
    known = []
    for variant in found.variants:
        colour, number = style(found, variant)
        known.append(LegendEntry(variant.label, colour, STROKES[number % len(STROKES)], variant in few))
    return known


def _ranked_by(found: Comparison) -> list[Measure]:
    """The measure that ranks the variants, and reward accuracy, if known."""
    measures = [measure for measure in (found.rank_by, ACCURACY) if measure is not None]
    return [m for m in dict.fromkeys(measures) if any(m.values(variant) for variant in found.variants)]


def overviews(found: Comparison) -> list[Chart]:
    """A row per variant with its interval and its seeds, the best on top."""
    drawn = []
    for measure in _ranked_by(found):
        figure = go.Figure()
        beside: dict[str, str] = {}
        for variant in in_rank_order(found.variants, measure):
            colour, label = style(found, variant)[0], safe(variant.label)
            beside[label] = in_lines(variant.label)
            seeds = [(member, y) for member in variant.members if (y := measure.value(member)) is not None]
            if len(seeds) > 1:
                figure.add_scatter(
                    x=[value for _, value in seeds],
                    y=[label] * len(seeds),
                    mode="markers",
                    marker={"size": 7, "opacity": 0.45, "color": colour},
                    text=[safe(format_value(member.seed)) for member, _ in seeds],
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
        figure.update_xaxes(**SHARE)
        ticks = {"tickvals": list(beside), "ticktext": list(beside.values())}
        figure.update_yaxes({"autorange": "reversed", "type": "category"} | ticks)
        figure.update_traces(showlegend=False)
        height = 28 + 16 * max(name.count("<br>") for name in beside.values())
        figure.update_layout(height=110 + height * len(beside))
        note = (
            f"Large points are means over seeds with 95% intervals, small ones single seeds. Horizontal: {measure.axis}"
        )
        note += "; the dotted line is a draw." if measure is WIN_RATE else "."
        title = measure.name.capitalize()
        drawn.append(as_chart(f"glance-{_slug(measure.name)}", title, note, figure, measure.name, ""))
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
        colour, number = style(found, variant)
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
                name=safe(variant.label),
                legendgroup=safe(variant.label),
                showlegend=False,
                marker=look | {"size": 7, "opacity": 0.45},
                text=[safe(f"{variant.label}, seed {format_value(member.seed)}") for member, _, _ in known],
                hovertemplate="<b>%{text}</b><br>%{y:.1%} at %{x:.3g} nats<extra></extra>",
            )
        figure.add_scatter(
            x=[x],
            y=[y],
            error_x=_bars([x], [(x - error, x + error)], colour) | {"visible": has_error},
            error_y=_bars([y], [interval(measure, whole) or (y, y)], colour),
            mode="markers",
            name=in_lines(variant.label),
            legendgroup=safe(variant.label),
            showlegend=len(found.variants) <= _MAX_LEGEND,
            marker=look | {"size": 11},
            hovertemplate=f"<b>{safe(variant.label)}</b><br>%{{y:.1%}} at %{{x:.3g}} nats<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_yaxes(**SHARE)
    note = f"Large points are variants with 95% intervals, small ones their seeds. Horizontal: {distance.axis}. Higher "
    note += "is better, and so is nearer to the reference. "
    if len(found.variants) <= _MAX_LEGEND:
        note += "Click a legend entry to hide a variant; double-click it to see that variant alone."
    else:
        note += "Point at a mark to see its variant."
    title = f"{measure.name.capitalize()} against distance"
    return as_chart(f"frontier-{_slug(measure.name)}", title, note, figure, distance.name, measure.name)


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
        drawn.append(as_chart(f"over-{_slug(f'{loss} {key}')}", title, note, figure, name, measure.name))
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
        label = safe(name)
        colour = COLOURS[number % len(COLOURS)] if len(groups) > 1 else style(found, group[0])[0]
        setting = safe(key.removeprefix("loss."))
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
            text=[safe(format_value(seed)) for _, _, seed in seeds],
            hovertemplate=f"<b>{label}</b>, seed %{{text}}<br>{setting} %{{x}}: %{{y:.1%}}<extra></extra>",
        )
        means = [measure.mean(variant) or 0.0 for variant in group]
        bounds = [interval(measure, variant) or (mean, mean) for variant, mean in zip(group, means, strict=True)]
        figure.add_scatter(
            x=[variant.settings[key] for variant in group],
            y=means,
            error_y=_bars(means, bounds, colour),
            mode="lines+markers",
            name=in_lines(name),
            legendgroup=label,
            showlegend=len(groups) > 1,
            line={"color": colour, "width": 2},
            marker={"size": 9, "symbol": SYMBOLS[number % len(SYMBOLS)]},
            hovertemplate=f"<b>{label}</b><br>{setting} %{{x}}: %{{y:.1%}}<extra></extra>",
        )
    return figure
