"""The look of all figures: colours, dashes and symbols that charts of the page, plots and notebooks share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b82d6", "#d2622a", "#2f9e6e", "#b35fc4", "#a8820f", "#d6457f", "#4f93a6", "#8577d8")
"""Colours of lines and points, in order of use. Each has a contrast of 3 or more to a white and to a dark page."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Plotly's dashes, for lines that share a colour."""

STROKES = ("", "8 5", "2 4", "8 4 2 4", "14 5", "14 4 2 4")
"""The same dashes in SVG."""

LINE_STYLES = ("-", "--", ":")
"""Matplotlib's dashes."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
"""Plotly's symbols, for points that share a colour."""


def style_axes(axes: Axes, title: str, x: str, y: str, pad: float | None = None) -> None:
    """Give Matplotlib axes their titles (`pad` points above them), a light grid and no frame on top and right."""
    axes.set_title(title, fontsize=11, pad=pad)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_level(axes: Axes, level: float | None) -> None:
    """Draw a dashed line to compare curves with; None draws nothing."""
    if level is not None:
        axes.axhline(level, color="0.5", linewidth=1, linestyle="--", zorder=1)
