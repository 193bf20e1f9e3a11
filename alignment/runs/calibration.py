"""How often a reward model is right where it is sure: a table for the report of its run."""

from __future__ import annotations

from collections.abc import Sequence

from alignment.evaluation.calibration import Bin, reliability
from alignment.evaluation.intervals import wilson_interval
from alignment.runs.folder import RunFiles, dig, read_rows
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
