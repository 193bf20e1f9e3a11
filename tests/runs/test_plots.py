from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from alignment.runs import plots
from alignment.runs.folder import series
from alignment.runs.plots import write_plots
from alignment.runs.style import COLOURS


def row(stage: str, split: str, step: int, **metrics: float) -> dict[str, Any]:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return {"stage": stage, "split": split, "step": step, "time": "t", "wall_s": 1.0, **named}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures by file name, as they are saved."""
    found: dict[str, Figure] = {}
    save = plots._save

    def keep(figure: Figure, path: Path) -> Path:
        found[path.name] = figure
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return found


def test_series_are_of_one_stage_split_and_name_and_finite() -> None:
    rows = [
        row("sft", "train", 1, loss=9.0),
        row("preference", "train", 1, loss=0.7),
        row("preference", "eval", 1, loss=0.8),
        row("preference", "train", 2, loss=math.nan),
        row("preference", "train", 3, other=1.0),
        row("preference", "train", 4, loss=0.5),
    ]
    assert series(rows, "preference", "train", "loss") == ([1, 4], [0.7, 0.5])


def test_no_accuracy_is_shown_of_a_policy_that_is_its_own_reference() -> None:
    """A tie does not count as right, so it would begin at 0; a policy with another reference has an accuracy."""
    rows = [
        row("preference", "eval", 0, rewards__accuracies=0.0, rewards__margins=3e-6, ranking__accuracies=0.25),
        row("preference", "eval", 0, rewards__accuracies=0.5, rewards__margins=-0.2),
        row("preference", "eval", 4, rewards__accuracies=0.0, rewards__margins=0.0),
    ]
    assert series(rows, "preference", "eval", "rewards/accuracies") == ([0, 4], [0.5, 0.0])
    assert series(rows, "preference", "eval", "ranking/accuracies") == ([0], [0.25])
    assert series(rows, "preference", "eval", "rewards/margins")[1] == [3e-6, -0.2, 0.0]


@pytest.mark.slow
def test_curves_carry_the_data_and_say_what_they_are(tmp_path: Path, figures: dict[str, Figure]) -> None:
    rows = [row("sft", "train", step, loss=3.0 - step) for step in (1, 2)]
    for step in range(4):
        rows.append(row("preference", "train", step, loss=0.7 - step / 10, logps__chosen=-10.0, logps__rejected=-step))
    rows.append(row("preference", "eval", 3, loss=0.6, logps__chosen=-11.0))
    written = write_plots(rows, tmp_path)
    assert [path.name for path in written] == ["loss.png", "logps.png"]
    sft, preference = figures["loss.png"].axes
    assert [line.get_xydata().tolist() for line in sft.lines] == [[[1, 2], [2, 1]]]
    train, evaluation = preference.lines
    assert train.get_ydata().tolist() == pytest.approx([0.7, 0.6, 0.5, 0.4])
    assert train.get_linestyle() == "-"
    assert evaluation.get_xydata().tolist() == [[3, 0.6]]
    assert evaluation.get_linestyle() == "None"
    assert evaluation.get_marker() == "o"
    (axes,) = figures["logps.png"].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "chosen, train",
        "chosen, eval",
        "rejected, train",
    ]
    assert "nats" in axes.get_ylabel()
    assert "step" in axes.get_xlabel()
    chosen, _, rejected = axes.lines
    assert chosen.get_color() != rejected.get_color()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "file"),
    [
        ("rewards/margins", "rewards_margins.png"),
        ("rewards/accuracies", "rewards_accuracies.png"),
        ("logps/rejected", "logps.png"),
        ("nats/margins", "nats_margins.png"),
        ("lengths/chosen", "lengths.png"),
    ],
)
def test_one_point_of_one_metric_is_one_visible_figure(
    tmp_path: Path, figures: dict[str, Figure], metric: str, file: str
) -> None:
    (path,) = write_plots([row("preference", "train", 5) | {metric: 0.25}], tmp_path)
    assert path == tmp_path / file
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    (axes,) = figures[file].axes
    pixels = pixels[round((1 - axes.get_position().y1) * len(pixels)) :]  # without the legend
    near = [np.abs(pixels - tuple(bytes.fromhex(colour[1:]))).sum(-1) < 60 for colour in COLOURS[:2]]
    assert (near[0] | near[1]).sum() > 20, "the point can be seen"
    assert path.stat().st_size < 100_000


def test_what_is_evaluated_alone_is_joined(tmp_path: Path, figures: dict[str, Figure]) -> None:
    rows = [row("preference", "eval", step, answers__score=step / 8, answers__win_rate=0.5) for step in (0, 4, 8)]
    assert [path.name for path in write_plots(rows, tmp_path)] == ["answers_score.png", "answers_win_rate.png"]
    [line] = figures["answers_score.png"].axes[0].lines
    assert line.get_xydata().tolist() == [[0, 0], [4, 0.5], [8, 1]] and line.get_linestyle() == "-"
    assert len(figures["answers_win_rate.png"].axes[0].lines) == 2, "and the level of a draw"


@pytest.mark.parametrize("rows", [[], [row("sft", "train", 1, loss=math.nan)], [row("sft", "train", 1, grad_norm=1.0)]])
def test_nothing_to_draw_is_no_figure(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert write_plots(rows, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()
