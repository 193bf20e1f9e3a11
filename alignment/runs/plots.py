"""The curves of one run: a PNG for each question that they answer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignment.evaluation.calibration import Bin
from alignment.evaluation.intervals import wilson_interval
from alignment.files import atomic_write_bytes
from alignment.runs.folder import series
from alignment.runs.record import STAGES
from alignment.runs.style import COLOURS, LINE_STYLES, draw_level, style_axes


@dataclass(frozen=True)
class _Plot:
    """One figure: its metrics with their labels, and the meaning of the vertical axis."""

    file: str
    title: str
    axis: str
    metrics: dict[str, str]
    level: float | None = None


_LOSS = "loss"
_PREFERENCE_PLOTS = (
    _Plot(
        "rewards_margins.png",
        "Reward margin",
        "chosen - rejected (the loss's own units)",
        {"rewards/margins": "margin"},
        0.0,
    ),
    _Plot(
        "rewards_accuracies.png",
        "Reward accuracy",
        "share of pairs ranked rightly",
        {"rewards/accuracies": "accuracy"},
        0.5,
    ),
    _Plot(
        "logps.png",
        "Log-probability of the completions",
        "log-prob per completion (nats)",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    _Plot(
        "nats_margins.png",
        "Margin over the reference, comparable between losses",
        "log-ratio, chosen - rejected (nats)",
        {"nats/margins": "margin"},
        0.0,
    ),
    _Plot(
        "lengths.png",
        "Completion length in the data",
        "tokens per completion",
        {"lengths/chosen": "chosen", "lengths/rejected": "rejected"},
    ),
    _Plot("answers_score.png", "Held-out answers", "judge's score (mean)", {"answers/score": "score"}),
    _Plot(
        "answers_win_rate.png",
        "Held-out answers against those of the start",
        "win rate (a tie is half a win)",
        {"answers/win_rate": "win rate"},
        0.5,
    ),
)


def _draw(axes: Axes, metrics: Sequence[dict[str, Any]], stage: str, names: dict[str, str]) -> bool:
    """Draw training as lines and evaluation as markers, in a colour per metric, or per split if there is one metric.

    The markers of a metric that training does not have are joined.
    """
    drawn = False
    for index, (name, label) in enumerate(names.items()):
        for split in ("train", "eval"):
            steps, values = series(metrics, stage, split, name)
            if not steps:
                continue
            drawn = True
            second = index == 1 if len(names) > 1 else split == "eval"
            colour = COLOURS[second]
            text = f"{label}, {split}" if len(names) > 1 else split
            if split == "train":
                marker = "v" if len(steps) < 3 else ""
                style = LINE_STYLES[index]  # so that a print in grey tells them apart
                axes.plot(steps, values, style, color=colour, linewidth=1.4, marker=marker, label=text, zorder=2)
            else:
                shape = "s" if index else "o"
                axes.plot(
                    steps,
                    values,
                    color=colour,
                    linestyle="" if series(metrics, stage, "train", name)[0] else LINE_STYLES[index],
                    marker=shape,
                    markersize=7,
                    markeredgecolor="white",
                    label=text,
                    zorder=3,
                )
    return drawn


def _finish(axes: Axes, title: str, axis: str, stage: str, level: float | None) -> None:
    style_axes(axes, title, f"optimizer step of the {'SFT' if stage == 'sft' else stage} stage", axis, pad=24)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    draw_level(axes, level)
    low, high = axes.get_xlim()
    if high - low < 1:  # one step only: without this the ticks are fractions of a step
        middle = round((low + high) / 2)
        axes.set_xlim(middle - 1, middle + 1)
    # Above the axes, where no curve can run through it.
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=9, frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic_write_bytes(path, buffer.getvalue())
    return path


def write_plots(metrics: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Draw the rows of `read_metrics` into the folder `out`; returns the PNG files."""
    written = []
    stages = [s for s in STAGES if any(series(metrics, s, split, _LOSS)[0] for split in ("train", "eval"))]
    if stages:
        figure = Figure(figsize=(1 + 5 * len(stages), 3.8), layout="constrained")
        for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
            _draw(axes, metrics, stage, {_LOSS: _LOSS})
            if stage == "sft":
                _finish(axes, "SFT loss", "loss (nats per completion token)", stage, None)
            else:
                _finish(axes, "Preference loss", "loss (mean over pairs or rows)", stage, None)
        written.append(_save(figure, out / "loss.png"))
    for plot in _PREFERENCE_PLOTS:
        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axes = figure.subplots()
        if _draw(axes, metrics, "preference", plot.metrics):
            _finish(axes, plot.title, plot.axis, "preference", plot.level)
            written.append(_save(figure, out / plot.file))
    return written


def write_reliability(bins: Sequence[Bin], out: Path) -> Path:
    """Draw accuracy over confidence into the folder `out`, with intervals and the diagonal; returns the PNG file."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes: Any = figure.subplots()
    style_axes(axes, "Reliability on held-out pairs", "probability that it gives its choice", "share where it is right")
    axes.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, linestyle="--")
    around = [wilson_interval(part.accuracy, part.pairs) for part in bins]
    axes.errorbar(
        [part.confidence for part in bins],
        [part.accuracy for part in bins],
        yerr=[
            [max(0.0, part.accuracy - low) for part, (low, _) in zip(bins, around, strict=True)],
            [max(0.0, high - part.accuracy) for part, (_, high) in zip(bins, around, strict=True)],
        ],
        fmt="o",
        color=COLOURS[0],
        markeredgecolor="white",
        capsize=3,
    )
    return _save(figure, out / "reliability.png")
