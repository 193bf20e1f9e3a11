"""Tables of a run for its trackers: the held-out pairs before and after, and the answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.runs.folder import MODEL_TITLES
from alignment.runs.record import json_row, read_lines
from alignment.runs.trackers.base import Cell
from alignment.runs.tracking import Tracker

Table = tuple[list[str], list[list[Cell]]]
"""Header and rows."""

_OF_PAIRS = (
    "rewards/margins",
    "nats/margins",
    "ranking/accuracies",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)
"""What is shown of a held-out pair; a labelled row has the values of its side."""


def send_results(tracker: Tracker, run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Send what a finished run has beside its metrics: its tables, its report, its plots and its summary."""
    if (table := held_out_table(run_dir)) is not None:
        tracker.table("held_out", *table)
    samples = run_dir / "samples.jsonl"
    if samples.exists():
        tracker.table("samples", *samples_table(read_lines(samples, json_row)[0]))
    tracker.files("report", [run_dir / "report.md", *sorted(run_dir.glob("plots/*.png"))])
    tracker.summary(summary)


def held_out_table(run_dir: Path) -> Table | None:
    """Every held-out pair with its margins before and after the preference stage; None for a run without such."""
    path = run_dir / "held_out.jsonl"
    if not path.exists():
        return None
    found = read_lines(path, json_row)[0]
    start, final = ([row for row in found if row["moment"] == moment] for moment in ("start", "final"))
    names = [name for name in _OF_PAIRS if any(name in row for row in final)]
    header = ["source", "key", *(f"{name} {when}" for name in names for when in ("before", "after"))]
    rows: list[list[Cell]] = [
        [after["source"], after["key"], *(row.get(name) for name in names for row in (before, after))]
        for before, after in zip(start, final, strict=True)  # the same items in the same order
    ]
    return header, rows


def samples_table(samples: Sequence[Mapping[str, Any]]) -> Table:
    """Prompts with the answer of each model, and what the judge says of them.

    Args:
        samples: as in samples.jsonl.
    """
    models = [name for name in MODEL_TITLES if any(name in sample for sample in samples)]
    judged = [name for name in models if any(name in sample.get("verdicts", {}) for sample in samples)]
    compared = [name for name in models if any(name in sample.get("preferences", {}) for sample in samples)]
    header = ["prompt", *(MODEL_TITLES[name] for name in models)]
    header += [f"score, {MODEL_TITLES[name]}" for name in judged]
    header += [f"final against {MODEL_TITLES[name]}" for name in compared]
    rows: list[list[Cell]] = []
    for sample in samples:
        row: list[Cell] = [sample["prompt"], *(sample.get(name) for name in models)]
        row += [sample["verdicts"][name].get("score") for name in judged]
        row += [{1: "better", 0: "tie", -1: "worse"}[sample["preferences"][name]["outcome"]] for name in compared]
        rows.append(row)
    return header, rows
