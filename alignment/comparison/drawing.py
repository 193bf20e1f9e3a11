"""What all charts of a comparison have in common: their form, and the colours of variants."""

from __future__ import annotations

import html
import json
import textwrap
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from alignment.comparison.members import Variant
from alignment.comparison.ranking import Comparison
from alignment.runs.style import COLOURS

_LINE = 28
"""Characters of a line of a variant's name in a chart."""

SHARE: dict[str, Any] = {"tickformat": ".0%", "autorangeoptions": {"clipmin": -0.03, "clipmax": 1.03}}
"""An axis of shares: no more than all, and space for a point that lies there."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure; `figure` is its data and layout for Plotly."""

    name: str
    title: str
    note: str
    figure: dict[str, Any]

    @property
    def num_entries(self) -> int:
        """Number of lines in its legend, for which the page makes space."""
        shown = [trace for trace in self.figure["data"] if trace.get("showlegend", True)]
        return sum(1 + trace.get("name", "").count("<br>") for trace in shown)


def style(found: Comparison, variant: Variant) -> tuple[str, int]:
    """The variant's colour, and its index among the variants with that colour."""
    losses = list(dict.fromkeys(v.loss for v in found.variants))
    if len(losses) == 1:
        index = found.variants.index(variant)
        return COLOURS[index % len(COLOURS)], index // len(COLOURS)
    same = [v for v in found.variants if v.loss == variant.loss]
    return COLOURS[losses.index(variant.loss) % len(COLOURS)], same.index(variant)


def as_chart(name: str, title: str, note: str, figure: go.Figure, x: str, y: str) -> Chart:
    """A figure with the look of all charts.

    Args:
        name: of its place on the page.
        x, y: titles of the axes.
    """
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


def safe(text: str) -> str:
    """Escape a text: Plotly would read some tags in it."""
    return html.escape(text.encode("utf-8", "replace").decode(), quote=False)


def in_lines(text: str) -> str:
    """The same in lines that leave space for a chart beside or above them, on a phone too."""
    return "<br>".join(safe(line) for line in textwrap.wrap(text, _LINE, break_on_hyphens=False))
