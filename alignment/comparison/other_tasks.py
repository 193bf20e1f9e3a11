"""What `alignment.evaluate` has measured of runs beside their answers against each other: its other tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.comparison.between import FOUND, members_of
from alignment.comparison.members import ComparedRun
from alignment.comparison.tables import Table
from alignment.runs.folder import RunFiles, read_mapping, submapping
from alignment.runs.text import DASH, format_value, is_number, percent

_SHARES = {
    "ifeval": {"prompts": "IFEval, prompts followed", "instructions": "IFEval, instructions followed"},
    "implicit": {"sum": "implicit reward is right, sum", "mean": "implicit reward is right, mean per token"},
}
"""Shares with an interval, by the task and by their place in it."""


def other_tasks(folder: Path, members: Sequence[ComparedRun], titles: Mapping[str, str]) -> Table | None:
    """A row for each run that the evaluation in a folder has measured; None where it has done no other task.

    Args:
        titles: of the runs, by their names.
    """
    if not (folder / FOUND).exists():
        return None
    found = read_mapping(RunFiles(folder), FOUND)
    by_run: dict[str, dict[str, str]] = {}
    member_of = members_of(found, members)
    for task in found:
        for policy in submapping(found, task).get("policies") or () if task != "win_rate" else ():
            if (name := member_of.get(policy.get("name"))) is not None:
                by_run.setdefault(name, {}).update(_values(task, found[task], policy))
    columns = list(dict.fromkeys(column for values in by_run.values() for column in values))
    if not columns:
        return None
    rows = [
        [titles[member.name], *(by_run[member.name].get(column, DASH) for column in columns)]
        for member in members
        if member.name in by_run
    ]
    note = (
        "By python -m alignment.evaluate in this folder, whose page says more. Shares have 95% intervals, and so has "
        "what was forgotten of held-out SFT text: nats per token more than before. High accuracy of an implicit reward "
        "does not say that answers are good."
    )
    return Table("Other tasks", ["run", *columns], rows, note, is_numbers=True)


def _values(task: str, found: Mapping[str, Any], policy: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The columns of a policy's results in a task, and what stands in them."""
    for place, title in _SHARES.get(task, {}).items():
        share = submapping(policy, place)
        yield title, f"{percent(share.get('share'))}\n({percent(share.get('low'))} to {percent(share.get('high'))})"
    if task == "perplexity":
        yield "held-out SFT text, nats per token", format_value(policy.get("nats_per_token"))
        for match in found.get("matches") or ():
            if match.get("first") == policy.get("name"):
                low, more, high = (f"{match[key]:+.4f}" for key in ("low", "more", "high"))
                yield f"forgotten since {match.get('second')}", f"{more}\n({low} to {high})"
    for name, metrics in submapping(policy, "results").items():  # of lm-eval
        for metric, value in metrics.items():
            if is_number(value) and "_stderr" not in metric and metric != "sample_len":
                yield f"{name}, {metric.replace(',none', '')}", format_value(value)
