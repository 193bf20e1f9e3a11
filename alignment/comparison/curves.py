"""Charts with a line for each run: over the steps of training, over its rounds, over its stages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from alignment.comparison.drawing import SHARE, Chart, as_chart, safe, style
from alignment.comparison.members import ComparedRun, Variant
from alignment.comparison.ranking import Comparison
from alignment.losses import title as loss_title
from alignment.runs.folder import MODEL_TITLES, by_round, dig, series
from alignment.runs.style import DASHES, SYMBOLS
from alignment.runs.text import format_value, is_number

_WINDOW = 5
"""A point of a training curve is the mean of this many steps, because one step has few pairs."""

_METRICS = (
    ("Margin over the reference", "log-ratio, chosen - rejected (nats)", "nats/margins"),
    ("Reward accuracy, by the log-ratio to the reference", "share of pairs ranked correctly", "nats/accuracies"),
    ("Accuracy of the loss's own reward", "share of pairs ranked correctly", "rewards/accuracies"),
    ("Ranking accuracy, by the log-prob of the policy alone", "share of pairs ranked correctly", "ranking/accuracies"),
    ("Log-prob of chosen completions", "log-prob (nats)", "logps/chosen"),
    ("Log-prob of rejected completions", "log-prob (nats)", "logps/rejected"),
    ("Offline log-ratio to the reference", "mean log-ratio (nats)", "kl/offline"),
    ("Score of held-out answers", "judge's score (mean)", "answers/score"),
    ("Win rate of held-out answers against the start of the stage", "share, ties half", "answers/win_rate"),
)

_ROUNDS = (
    ("Score of a round's answers", "judge's score, mean of all answers", "onpolicy/score_mean"),
    ("Best score of each prompt in a round", "judge's score, mean of the best answers", "onpolicy/score_best"),
    ("Informative prompts of a round", "share of prompts with something to train on", "onpolicy/informative"),
    ("Length of a round's answers", "tokens per answer (mean)", "onpolicy/length_mean"),
    ("KL to the start of the stage, at each round", "nats per answer", "onpolicy/kl_start"),
    ("Staleness at the end of a round", "log-prob now - when drawn (nats per token)", "onpolicy/staleness"),
    ("Answers that still count at the end of a round", "effective share of the answers", "onpolicy/effective"),
)


def _line(found: Comparison, variant: Variant, member: ComparedRun, size: int, hover: str) -> dict[str, Any]:
    """The look of a run's line, and its text under the pointer."""
    colour, number = style(found, variant)
    label = safe(variant.label)
    return {
        "mode": "lines+markers",
        "name": label,
        "meta": found.variants.index(variant),  # its index in the shared legend
        "legendgroup": label,
        "line": {"color": colour, "dash": DASHES[number % len(DASHES)], "width": 2},
        "marker": {"size": size, "symbol": SYMBOLS[number % len(SYMBOLS)]},
        "hovertemplate": f"<b>{label}</b>, seed {safe(format_value(member.seed))}{hover}<extra></extra>",
    }


def _name_once(figure: go.Figure) -> None:
    """Give the lines of a variant one common legend entry."""
    named: set[str] = set()
    for line in figure.data:
        line.showlegend = line.name not in named
        named.add(line.name)


def curves(found: Comparison) -> list[Chart]:
    """A chart per metric, with a line per run."""
    drawn = []
    for title, axis, metric in _METRICS:
        figure, split = go.Figure(), _split(found, metric)
        where = "held-out pairs" if split == "eval" else f"training pairs, mean of the last {_WINDOW} steps"
        where = "answers to held-out prompts" if metric.startswith("answers/") else where
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
            note = f"One line per member; the seeds of a variant look alike. Values are of {where}"
            note += ", because held-out pairs were evaluated too rarely for a curve." if split == "train" else "."
            there = {line.meta for line in figure.data}
            absent = {loss_title(v.loss): None for index, v in enumerate(found.variants) if index not in there}
            note += f" Not measured for {', '.join(absent)}." if absent else ""
            if metric.endswith(("accuracies", "win_rate")):
                figure.update_yaxes(**SHARE)
            if any(variant.stopped for variant in found.variants):
                note += " A line that ends early belongs to a member that was stopped early."
            x = "optimizer step of the preference stage"
            drawn.append(as_chart(metric.replace("/", "-"), title, note, figure, x, axis))
    return drawn


def rounds(found: Comparison) -> list[Chart]:
    """A chart per metric of on-policy rounds, with a line per run that has them."""
    drawn, note = [], "One line per member that trains in rounds, on answers of its own."
    for title, axis, metric in _ROUNDS:
        figure = go.Figure()
        for variant in found.variants:
            for member in variant.begun:
                if values := by_round(member.run.metrics, metric):
                    look = _line(found, variant, member, 6, "<br>round %{x}: %{y:.3g}")
                    figure.add_scatter(x=list(values), y=list(values.values()), **look)
        _name_once(figure)
        if figure.data:
            figure.update_xaxes(dtick=-(-max(max(line.x) for line in figure.data) // 10))
            if metric.endswith(("informative", "effective")):
                figure.update_yaxes(**SHARE)
            drawn.append(as_chart(re.sub("[/_]", "-", metric), title, note, figure, "round", axis))
    return drawn


def _trailing(values: Sequence[float]) -> list[float]:
    """The mean of each value and the values before it, up to `_WINDOW` of them."""
    windows = [values[max(0, i - _WINDOW + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _split(found: Comparison, metric: str) -> str:
    """The split to draw: "eval", unless it has too few points for a curve and "train" has more."""
    points = {
        split: max(
            (len(series(member.run.metrics, "preference", split, metric)[0]) for member in found.members), default=0
        )
        for split in ("eval", "train")
    }
    return "eval" if points["eval"] > 2 or points["eval"] >= points["train"] else "train"


def lengths(found: Comparison) -> list[Chart]:
    """Mean length of the answers before training and after each stage."""
    figure = go.Figure()
    for variant in found.variants:
        for member in variant.members:
            words = {
                title: dig(member.run.summary, "evaluation", "answers", model, "words")
                for model, title in MODEL_TITLES.items()
            }
            values = {title: value for title, value in words.items() if is_number(value)}
            if values:
                look = _line(found, variant, member, 7, "<br>%{x}: %{y:.3g} words")
                figure.add_scatter(x=list(values), y=list(values.values()), **look)
    _name_once(figure)
    if not figure.data:
        return []
    note = "A judge may favour long or short answers, so length may explain part of a win."
    return [as_chart("lengths", "Length of answers", note, figure, "", "words per answer (mean)")]
