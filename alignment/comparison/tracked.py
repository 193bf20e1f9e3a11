"""What a comparison sends to W&B: its sentences, its charts and a table of plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from alignment.comparison.charts import Chart, charts
from alignment.comparison.measures import CRITERIA, DRIFT, MARGIN, RANKING_PER_TOKEN, WORDS, kl_measure
from alignment.comparison.members import Variant
from alignment.comparison.ranking import Comparison, interval
from alignment.comparison.sentences import cautions, headline
from alignment.comparison.statistics import ranks
from alignment.comparison.tables import settings_and_data
from alignment.runs.sweep_tracking import SweepSummary
from alignment.runs.text import escape_markdown, format_value


def sweep_summary(found: Comparison, files: Sequence[Path]) -> SweepSummary:
    """The comparison as a sweep's run in W&B, with the files that it was written to."""
    header, rows = _table(found)
    return SweepSummary(
        facts={name: value for name, value, *_ in settings_and_data(found).rows},
        notes="\n".join(
            f"- {escape_markdown(said)}" for said in [*headline(found), *(kind for kind, _ in cautions(found))]
        ),
        values=_values(found),
        header=header,
        rows=rows,
        figures={chart.name: _figure(chart) for several in charts(found).values() for chart in several}
        | _parallel(found, header, rows),
        files=files,
    )


def _table(found: Comparison) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: a row per variant, the best first."""
    known = (*CRITERIA, RANKING_PER_TOKEN, MARGIN, DRIFT, WORDS, kl_measure(found.members))
    measures = [m for m in known if m is not None and any(m.values(variant) for variant in found.variants)]
    header = ["variant", "loss", *(key.removeprefix("loss.").replace(".", " ") for key in found.differing_settings)]
    header += ["seeds", "rank"]
    for measure in measures:
        header += [measure.name, *(f"{measure.name}, {part}" for part in ("low", "high", "items") if measure.share)]
    places = ranks([found.rank_by.mean(v) or 0.0 for v in found.ranked]) if found.rank_by is not None else []
    rows = []
    for i, variant in enumerate([*found.ranked, *(v for v in found.variants if v not in found.ranked)]):
        row: list[Any] = [variant.label, variant.loss, *(variant.settings.get(key) for key in found.differing_settings)]
        row += [", ".join(map(format_value, variant.seeds)), places[i] if i < len(places) else None]
        for measure in measures:
            row.append(measure.mean(variant))
            if measure.share:
                row += [*(interval(measure, variant) or (None, None)), measure.num_items(variant) or None]
        rows.append(row)
    return header, rows


def _parallel(found: Comparison, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, go.Figure]:
    """A line per variant through its loss, the settings that differ, and what came of them, coloured by the last.

    Nothing where no setting differs or nothing was measured.
    """
    measure = found.rank_by
    settings = header[1 : header.index("seeds")]
    if measure is None or measure.name not in header:
        return {}
    shown = [row for row in rows if row[header.index(measure.name)] is not None]
    columns = {name: [row[header.index(name)] for row in shown] for name in [*settings, measure.name]}
    differing = {name: values for name, values in columns.items() if len(set(map(str, values))) > 1}
    if set(differing) <= {measure.name}:
        return {}
    last = columns[measure.name]
    axes = [_axis(name, values) for name, values in (differing | {measure.name: last}).items()]
    figure = go.Figure(go.Parcoords(dimensions=axes, line={"color": last, "colorscale": "Viridis", "showscale": True}))
    return {"settings": figure.update_layout(title={"text": "Settings and what came of them", "x": 0.01}, margin_t=96)}


def _axis(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Numbers as they are; words, and numbers beside words, as places on the axis."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return {"label": name, "values": list(values)}
    words = list(dict.fromkeys(map(str, values)))
    places = [words.index(str(value)) for value in values]
    return {"label": name, "values": places, "tickvals": list(range(len(words))), "ticktext": words}


def _values(found: Comparison) -> dict[str, Any]:
    """The best variant of all and of each loss, and the number of members."""
    measure = found.rank_by
    if measure is None:
        return {"members": len(found.members), "members_with_result": 0}
    ended = sum(len(measure.values(variant)) for variant in found.ranked)
    values: dict[str, Any] = {"members": len(found.members), "members_with_result": ended, "ranked_by": measure.axis}
    own: dict[str, list[Variant]] = {"best": found.ranked}
    for variant in found.ranked:
        own.setdefault(f"best_{variant.loss}", []).append(variant)
    for name, (top, *others) in own.items():
        share = measure.mean(top)
        low, high = interval(measure, top) or (None, None)
        first = [top.label, *(other.label for other in others if measure.mean(other) == share)]
        values[name] = {"variant": "; ".join(first), "value": share, "low": low, "high": high}
    return values


def _figure(chart: Chart) -> go.Figure:
    """The chart without a page around it: with its title, and with the legend beside it."""
    beside = {"orientation": "v", "xref": "paper", "x": 1.02, "yref": "paper", "y": 1, "yanchor": "top"}
    return go.Figure(chart.figure).update_layout(title={"text": chart.title, "x": 0.01}, margin_t=48, legend=beside)
