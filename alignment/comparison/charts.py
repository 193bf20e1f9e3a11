"""The charts of a comparison, as Plotly figures that the page draws."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from alignment.comparison.measures import KLS, Measure, kl, kl_error
from alignment.comparison.members import Member, Variant
from alignment.comparison.ranking import Comparison, interval
from alignment.run_folder import is_number, series, shown

COLOURS = ("#3b82d6", "#d2622a", "#2f9e6e", "#b35fc4", "#a8820f", "#d6457f", "#4f93a6", "#8577d8")
"""Of losses, or of variants where there is one loss: each has a contrast of 3 or more to white and to the dark page."""

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")

CURVES = (
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


def library() -> str:
    """The JavaScript that draws the figures."""
    return str(get_plotlyjs())


def _style(found: Comparison, variant: Variant) -> tuple[str, int]:
    """Its colour, and which of the variants with that colour it is."""
    losses = list(dict.fromkeys(v.loss for v in found.variants))
    if len(losses) == 1:
        return COLOURS[found.variants.index(variant) % len(COLOURS)], 0
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
    return html.escape(text, quote=False)


def _line(found: Comparison, variant: Variant, member: Member, first: bool, size: int, hover: str) -> dict[str, Any]:
    """How a member's line looks and what it says where it is pointed at; the first of a variant has the legend."""
    colour, number = _style(found, variant)
    return {
        "mode": "lines+markers",
        "name": _safe(variant.label),
        "legendgroup": _safe(variant.label),
        "showlegend": first,
        "line": {"color": colour, "dash": _DASHES[number % len(_DASHES)], "width": 2},
        "marker": {"size": size, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
        "hovertemplate": f"<b>{_safe(variant.label)}</b>, seed {_safe(shown(member.seed))}{hover}<extra></extra>",
    }


def curves(found: Comparison) -> list[Chart]:
    """A chart per metric with a line per member, held-out values where there are several, else those of training."""
    drawn = []
    for title, axis, metric in CURVES:
        figure, splits = go.Figure(), set()
        for variant in found.variants:
            first = True
            for member in variant.members:
                held_out = series(member.run.metrics, "preference", "eval", metric)
                trained = series(member.run.metrics, "preference", "train", metric)
                split, (steps, values) = ("held-out", held_out) if len(held_out[0]) > 1 else ("training", trained)
                if not steps:
                    continue
                splits.add(split)
                look = _line(found, variant, member, first, 5, f", {split}<br>step %{{x}}: %{{y:.4g}}")
                figure.add_scatter(x=steps, y=values, **look)
                first = False
        if splits:
            note = f"Over {' and '.join(sorted(splits))} pairs. A line is a member; seeds of a variant look alike."
            x = "optimizer step of the preference stage"
            drawn.append(_chart(metric.replace("/", "-"), title, note, figure, x, axis))
    return drawn


def lengths(found: Comparison) -> Chart | None:
    """Mean lengths of answers before, between and after the stages."""
    figure = go.Figure()
    moments = {"start": "before training", "sft": "after SFT", "final": "final"}
    for variant in found.variants:
        first = True
        for member in variant.members:
            answers = member.run.summary.get("evaluation") or {}
            answers = answers.get("answers") if isinstance(answers, dict) else None
            values = {
                title: entry["words"]
                for moment, title in moments.items()
                if isinstance(answers, dict)
                and isinstance(entry := answers.get(moment), dict)
                and is_number(entry.get("words"))
            }
            if not values:
                continue
            look = _line(found, variant, member, first, 7, "<br>%{x}: %{y:.4g} words")
            figure.add_scatter(x=list(values), y=list(values.values()), **look)
            first = False
    if not figure.data:
        return None
    note = "A judge may favour long answers, or short ones: part of a win may be nothing else."
    return _chart("lengths", "Length of answers", note, figure, "", "words per answer (mean)")


def frontier(found: Comparison) -> Chart | None:
    """What was won for how much distance from the reference: a point per member."""
    measure, distance = found.rank_by, kl(found.members)
    if measure is None or distance is None:
        return None
    figure = go.Figure()
    for variant in found.variants:
        colour, number = _style(found, variant)
        known = [
            (member, x, y)
            for member in variant.members
            if (x := distance.value(member)) is not None and (y := measure.value(member)) is not None
        ]
        if not known:
            continue
        bounds = [interval(measure, Variant(variant.loss, {}, [member])) or (y, y) for member, _, y in known]
        errors = [1.96 * kl_error(member) for member, _, _ in known]
        across = [(x - error, x + error) for (_, x, _), error in zip(known, errors, strict=True)]
        figure.add_scatter(
            x=[x for _, x, _ in known],
            y=[y for _, _, y in known],
            error_x=_bars([x for _, x, _ in known], across, colour) | {"visible": distance is KLS[0]},
            error_y=_bars([y for _, _, y in known], bounds, colour),
            mode="markers",
            name=_safe(variant.label),
            marker={"size": 11, "symbol": _SYMBOLS[number % len(_SYMBOLS)], "color": colour},
            text=[_safe(f"{variant.label}, seed {shown(member.seed)}") for member, _, _ in known],
            hovertemplate="<b>%{text}</b><br>%{y:.1%} at %{x:.3g} nats<extra></extra>",
        )
    if not figure.data:
        return None
    figure.update_yaxes(tickformat=".0%")
    note = (
        f"Each point is a member, its bars the 95% intervals. Across: {distance.axis}. Better is higher, and as near "
        "to the reference as can be."
    )
    return _chart(
        "frontier", f"{measure.name.capitalize()} against distance", note, figure, distance.name, measure.name
    )


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
    """What was ranked by over each number that differs between variants of one loss."""
    if found.rank_by is None:
        return []
    drawn = []
    for key in found.differing:
        figure = _over(found, found.rank_by, key)
        if figure.data:
            name = key.removeprefix("loss.")
            numbers = [x for trace in figure.data for x in trace.x]
            if min(numbers) > 0 and max(numbers) / min(numbers) >= 4:
                figure.update_xaxes(
                    type="log", tickvals=sorted(set(numbers)), ticktext=[shown(x) for x in sorted(set(numbers))]
                )
            figure.update_yaxes(tickformat=".0%")
            note = (
                "Means over seeds with their 95% intervals. A loss whose line lies flat within the bars does not mind."
            )
            drawn.append(
                _chart(
                    f"over-{key.replace('.', '-')}", f"Sensitivity to {name}", note, figure, name, found.rank_by.name
                )
            )
    return drawn


def _over(found: Comparison, measure: Measure, key: str) -> go.Figure:
    """A line for each group of variants that differ in this setting alone."""
    figure = go.Figure()
    lines: dict[tuple[Any, ...], list[Variant]] = {}
    for variant in found.variants:
        value = variant.settings.get(key)
        if is_number(value) and measure.values(variant):
            others = {k: v for k, v in variant.settings.items() if k != key}
            lines.setdefault((variant.loss, *others.items()), []).append(variant)
    for number, ((loss, *_), group) in enumerate(lines.items()):
        if len(group) < 2:
            continue
        others = {k: v for k, v in group[0].settings.items() if k != key}
        label = Variant(loss, others, []).label
        means = [measure.mean(variant) or 0.0 for variant in group]
        bounds = [interval(measure, variant) or (mean, mean) for variant, mean in zip(group, means, strict=True)]
        losses = list(dict.fromkeys(v.loss for v in found.variants))
        place = losses.index(loss) if len(losses) > 1 else number
        colour = COLOURS[place % len(COLOURS)]
        figure.add_scatter(
            x=[variant.settings[key] for variant in group],
            y=means,
            error_y=_bars(means, bounds, colour),
            mode="lines+markers",
            name=_safe(label),
            showlegend=True,
            line={"color": colour, "width": 2},
            marker={"size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
            hovertemplate=f"<b>{_safe(label)}</b><br>{_safe(key.removeprefix('loss.'))} %{{x}}: "
            "%{y:.1%}<extra></extra>",
        )
    return figure
