"""Figures for the notebooks: histograms, curves, and the plane of a loss."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from alignment.course.landscape import Landscape
from alignment.runs.folder import RunFiles, series
from alignment.runs.style import COLOURS, LINE_STYLES, draw_level, style_axes


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    style_axes(axes, title, x, y)
    return figure, axes


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def histograms(values: Mapping[str, Sequence[float]], title: str, x: str) -> Figure:
    """Histograms as outlines in one figure, with the same bins. Every bin of integers holds the same number of them."""
    figure, axes = _axes(title, x, "number")
    everything = np.array([v for some in values.values() for v in some])
    bins = np.histogram_bin_edges(everything, bins=30)
    if everything.dtype.kind == "i":
        width = math.ceil((np.ptp(everything) + 1) / 30)
        bins = np.arange(everything.min(), everything.max() + width + 1, width) - 0.5
    for index, (name, some) in enumerate(values.items()):
        axes.hist(some, bins=bins.tolist(), histtype="step", linewidth=1.6, color=_colour(index), label=name)
    axes.legend(frameon=False)
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, x: str, y: str, level: float | None = None
) -> Figure:
    """Lines by name, each with its x and y values, and a dashed `level` to compare with."""
    figure, axes = _axes(title, x, y)
    for index, (name, (xs, ys)) in enumerate(lines.items()):
        style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        axes.plot(xs, ys, style, color=_colour(index), linewidth=1.6, label=name)
    draw_level(axes, level)
    axes.legend(frameon=False, fontsize=9)
    return figure


def metric_curves(
    runs: Mapping[str, RunFiles], name: str, y: str, level: float | None = None, stage: str = "preference"
) -> Figure:
    """One metric of a stage of several runs: a line for training, points for the held-out pairs."""
    lines = {label: series(run.metrics, stage, "train", name) for label, run in runs.items()}
    figure = curves(lines, f"{name} (held-out pairs: points)", "optimizer step", y, level)
    [axes] = figure.axes
    for index, run in enumerate(runs.values()):
        steps, values = series(run.metrics, stage, "eval", name)
        axes.plot(steps, values, linestyle="", marker="o", markeredgecolor="white", color=_colour(index), zorder=3)
    return figure


def planes(landscapes: Mapping[str, Landscape]) -> Figure:
    """Each loss over a plane of log-ratios: its value as colour, the push of a step on both answers as arrows."""
    columns = min(3, len(landscapes))
    rows = math.ceil(len(landscapes) / columns)
    figure = Figure(figsize=(4 * columns, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for (name, found), axes in zip(landscapes.items(), grid, strict=False):
        u, v, height, up, down = (
            values.numpy() for values in (found.chosen, found.rejected, found.losses, found.push_up, found.push_down)
        )
        shape = len(np.unique(v)), len(np.unique(u))
        shade = axes.pcolormesh(u.reshape(shape), v.reshape(shape), height.reshape(shape), cmap="cividis")
        figure.colorbar(shade, ax=axes)
        every = np.zeros(shape, dtype=bool)
        every[:: max(1, shape[0] // 8), :: max(1, shape[1] // 8)] = True
        arrows = every.ravel()
        axes.quiver(u[arrows], v[arrows], up[arrows], -down[arrows], color="white", width=0.006)
        axes.plot([v.min(), v.max()], [v.min(), v.max()], color="white", linestyle="--", linewidth=1)
        axes.set_xlim(u.min(), u.max())
        axes.set_ylim(v.min(), v.max())
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("chosen: log-ratio (nats)")
        axes.set_ylabel("rejected: log-ratio (nats)")
    for axes in grid:
        axes.set_visible(False)
    return figure


def as_address(figure: Figure) -> str:
    """A figure as an address that holds its picture, for pages that load nothing. Names in legends are no formulas."""
    for axes in figure.axes:
        if legend := axes.get_legend():
            for text in legend.get_texts():
                text.set_parse_math(False)  # a dollar in a setting begins no formula
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
