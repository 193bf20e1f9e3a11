"""Reading a run folder: its files, the values inside them, and the curves in metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError
from alignment.files import atomic_write_text, damaged, file_digest, read_sealed
from alignment.runs.record import SEAL, SEALED, json_row, metrics_row, read_lines
from alignment.runs.text import format_value, is_number

RUN_FILES = ("config.yaml", "summary.json", "metrics.jsonl")
"""A folder with any of these is a run folder."""

MODEL_TITLES = {"start": "before training", "sft": "after SFT", "final": "final"}
"""The models that a run evaluates, as reports write them."""


@dataclass(slots=True)
class RunFiles:
    """The contents of a run folder.

    A file that is missing or cannot be read is empty here, and `problems` has a sentence about it.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run folder.

    Raises:
        UserError: the folder holds no file of a run, or cannot be opened.
    """
    if not holds_any(folder, RUN_FILES):
        raise UserError(f"{folder} is no run folder: it holds none of {', '.join(RUN_FILES)}.")
    run = RunFiles(folder)
    run.config = read_mapping(run, "config.yaml", _parse_config)
    run.summary = read_mapping(run, "summary.json")
    run.metrics = read_rows(run, "metrics.jsonl", metrics_row)
    if (folder / "samples.jsonl").exists() or dig(run.summary, "evaluation", "prompts"):
        run.samples = read_rows(run, "samples.jsonl")
    run.problems += _changed(folder)
    return run


def sweep_name(run_dir: Path) -> str | None:
    """Name of the sweep that the run belongs to, from the files that Hydra leaves; None if it belongs to none."""
    parent = run_dir.absolute().parent
    hydra = run_dir / ".hydra" / "hydra.yaml"  # other sweepers than Hydra's own write no multirun.yaml
    is_member = (parent / "multirun.yaml").exists() or (hydra.exists() and "mode: MULTIRUN" in hydra.read_text())
    return parent.name if is_member else None


UNCHANGED, CHANGED, MISSING = "as the run left it", "changed since the run ended", "missing"
"""What a file of a finished run may be now."""


def sealed_files(folder: Path) -> dict[str, str]:
    """Each file that the run took a digest of when it ended, and what it is now; empty for a run that did not end.

    Raises:
        UserError: the digests, or a file, cannot be read.
    """
    path = folder / SEAL
    if not path.exists():
        return {}
    sealed = read_sealed(path)
    if not isinstance(sealed, dict) or not sealed.keys() <= set(SEALED):
        raise damaged(path)
    return {name: _state(folder / name, digest) for name, digest in sealed.items()}


def _state(path: Path, digest: Any) -> str:
    if not path.is_file():
        return MISSING
    try:
        return UNCHANGED if file_digest(path) == digest else CHANGED
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _changed(folder: Path) -> list[str]:
    """A sentence for each file of a finished run that is not as the run left it."""
    try:
        states = sealed_files(folder)
    except UserError:
        return [f"{SEAL} cannot be read, so nobody knows whether files have changed since the run ended."]
    return [f"{name} has changed since the run ended." for name, state in states.items() if state == CHANGED]


def read_mapping(run: RunFiles, name: str, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The mapping in a file of the folder; empty if it cannot be read, which `run.problems` then names."""
    try:
        value = parse((run.folder / name).read_text("utf-8"))
        if isinstance(value, dict):
            run.problems += _without_false_accuracies(name, value)[:1]
            return value
        problem = "cannot be read: it holds no mapping."
    except FileNotFoundError:
        problem = "is missing."
    except OSError as error:
        problem = f"cannot be read: {error.strerror}."
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        problem = f"cannot be read: {' '.join(str(error).split())}."
    run.problems.append(f"{name} {problem}")
    return {}


def _parse_config(text: str) -> Any:
    if not text.endswith("\n"):  # half of a YAML file is a YAML file too
        raise ValueError("it is cut off")
    return yaml.safe_load(text)


def read_rows(
    run: RunFiles, name: str, parse: Callable[[bytes], dict[str, Any] | None] = json_row
) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file in the folder, without a last line that was cut off.

    What cannot be read is named in `run.problems`.
    """
    path = run.folder / name
    if not path.exists():
        run.problems.append(f"{name} is missing.")
        return []
    try:
        rows, is_cut_off = read_lines(path, parse)
    except UserError as error:
        run.problems.append(str(error).replace(str(path), name))  # a report names files, not paths
        return []
    if is_cut_off:
        run.problems.append(f"{name} was cut off in its last line, as happens when a run is killed.")
    elif not rows:
        run.problems.append(f"{name} is empty.")
    run.problems += [problem for row in rows for problem in _without_false_accuracies(name, row)][:1]
    return rows


def _without_false_accuracies(name: str, values: dict[str, Any]) -> list[str]:
    """Take out accuracies that no run writes, since they have no interval; a sentence for each."""
    problems = []
    for key, value in values.items():
        if isinstance(value, dict):
            problems += _without_false_accuracies(name, value)
        elif "accuracies" in key and is_number(value) and not 0 <= value <= 1:
            values[key] = None
            problems.append(f"{name} has {key}={format_value(value)}, which is no share, so it is left out.")
    return problems


def holds_any(folder: Path, names: Sequence[str]) -> bool:
    """Whether the folder holds one of these files.

    Raises:
        UserError: the folder cannot be opened.
    """
    try:
        return any((folder / name).is_file() for name in names)
    except OSError as error:
        raise UserError(f"{folder} cannot be opened: {error.strerror}.") from None


def write_page(path: Path, text: str) -> None:
    """Write a report.

    Raises:
        UserError: the file cannot be written; an earlier version of it stays.
    """
    try:
        # An answer may be cut in the middle of an emoji, and half an emoji is no UTF-8.
        atomic_write_text(path, text.encode("utf-8", "replace").decode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def dig(value: Any, *keys: str) -> Any:
    """The value under a path of keys; None if the path ends early."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def submapping(value: Any, *keys: str) -> dict[str, Any]:
    """The mapping under a path of keys; empty if there is none."""
    found = dig(value, *keys)
    return found if isinstance(found, dict) else {}


def as_count(value: Any) -> int:
    """A count that may be missing, as an integer: 0 if it is."""
    return int(value) if is_number(value) else 0


def eval_pairs(summary: dict[str, Any]) -> int:
    """Number of held-out pairs, rows or lists of the preference data; 0 if unknown."""
    return as_count(dig(summary, "data", "preference", "eval"))


def loss_name(summary: dict[str, Any]) -> str:
    """Name of the preference loss; "preference" if the summary does not have it."""
    return str(dig(summary, "stages", "preference", "loss") or "preference")


def stopped_at(summary: dict[str, Any]) -> str:
    """Where early stopping ended the run."""
    step, of_steps = (
        format_value(dig(summary, "stages", "preference", "stopped", key)) for key in ("step", "of_steps")
    )
    return f"stopped at step {step} of {of_steps}"


def status(summary: dict[str, Any]) -> str | None:
    """Status of the run; for one that was stopped early also where and why. None if unknown."""
    found, why = summary.get("status"), submapping(summary, "stages", "preference", "stopped")
    if found != "stopped" or not why:
        return None if found is None else format_value(found)
    rung, place, of_members = (format_value(why.get(key)) for key in ("rung", "place", "of_members"))
    metric, value = (format_value(why.get(key)) for key in ("metric", "value"))
    return f"{stopped_at(summary)}: at step {rung} number {place} of {of_members} members by {metric} ({value})"


ZERO_MARGIN = 1e-4
"""Margins below this are rounding."""


def is_rounding(row: Mapping[str, Any], name: str) -> bool:
    """Whether this is an accuracy of a policy that is its own reference yet: the signs of its rewards are rounding.

    Only a strictly higher reward counts as right, so it would be 0 or anything, and no curve begins there.
    """
    margin: Any = row.get(f"{name.removesuffix('accuracies')}margins")
    return name.endswith("/accuracies") and row.get("step") == 0 and is_number(margin) and abs(margin) < ZERO_MARGIN


def series(metrics: Sequence[dict[str, Any]], stage: str, split: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric, in the order of the rows, without accuracies that are rounding."""
    points = [
        (row["step"], row[name])
        for row in metrics
        if row["stage"] == stage and row["split"] == split and is_number(row.get(name)) and not is_rounding(row, name)
    ]
    return [step for step, _ in points], [value for _, value in points]


def by_round(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[int, float]:
    """A metric by round: a round's first row has its number, and a later one what is measured at its end."""
    values, number = {}, 0
    for row in rows:
        number = int(row.get("onpolicy/round", number))
        if is_number(row.get(metric)):
            values[number] = row[metric]
    return values


def first_and_last(run: RunFiles, name: str) -> tuple[float, float, str] | None:
    """First and last value of a preference metric, and their split: "eval" if it has two points, else "train"."""
    for split in ("eval", "train"):
        _, values = series(run.metrics, "preference", split, name)
        if len(values) >= 2:
            return values[0], values[-1], split
    return None
