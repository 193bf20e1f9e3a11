"""How often a reward model is right where it is sure: a table and a picture for the report of its run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from alignment.evaluation.calibration import Bin, reliability
from alignment.evaluation.intervals import wilson_interval
from alignment.runs.folder import RunFiles, dig, read_rows
from alignment.runs.plots import save
from alignment.runs.style import COLOURS, style_axes
from alignment.runs.text import is_number, percent

HEADER = ["pairs", "probability that it gives its choice", "choice is the chosen answer", "95% interval"]


def bins_of(run: RunFiles) -> list[Bin]:
    """The held-out pairs of a finished reward model, by how sure it is; empty for other runs."""
    if not is_number(dig(run.summary, "stages", "preference", "metrics", "eval/rewards/calibration_error")):
        return []
    rows = read_rows(run, "held_out.jsonl")
    final = [row for row in rows if row.get("moment") == "final" and is_number(row.get("rewards/margins"))]
    return reliability([row["rewards/margins"] for row in final]) if final else []


def calibration_rows(bins: Sequence[Bin]) -> list[list[str]]:
    """The rows under `HEADER`."""
    rows = []
    for part in bins:
        low, high = wilson_interval(part.accuracy, part.pairs)
        rows.append(
            [str(part.pairs), percent(part.confidence), percent(part.accuracy), f"{percent(low)} to {percent(high)}"]
        )
    return rows


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
    return save(figure, out / "reliability.png")
