"""What the files of a run folder say: read with care, put into words, and questioned as a careful reader would."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError
from alignment.files import atomic_write_text
from alignment.runs.record import STAGES, metrics_row
from alignment.runs.text import format_value, is_number

RUN_FILES = ("config.yaml", "summary.json", "metrics.jsonl")

_DEEPEST = 50
"""Levels within each other of a file: no run writes as many, and far more end the interpreter."""
_NAMED_LINES = 3
"""Broken lines of a file that are named."""

_NUMBERS = (
    *(("stages", stage, "metrics") for stage in STAGES),
    *(("evaluation", part) for part in ("answers", "win_rate", "kl/sampled")),
)
"""Sections of a summary that hold numbers alone."""


MODEL_TITLES = {"start": "before training", "sft": "after SFT", "final": "final"}


@dataclass(slots=True)
class RunFiles:
    """What could be read of a run folder; `problems` has a sentence for everything else.

    Attributes:
        has_gaps: lines of `metrics` are lost, and with them perhaps the first or last point of a curve.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    has_gaps: bool = False


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it holds no mapping")
    _check_depth(value, _DEEPEST)
    return value


def _check_depth(value: Any, left: int) -> None:
    if left < 0:
        raise ValueError("it is nested too deeply")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, left - 1)


def read_rows(run: RunFiles, name: str, numbers: Callable[[dict[str, Any]], Sequence[Any]]) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line.

    Lines that are none are left out, and `run.problems` says so, as it does of rows whose `numbers` are none.
    """
    rows, _ = _parsed_lines(run, name, _json_object)
    odd = sum(not all(map(is_number, numbers(row))) for row in rows)
    if odd:
        run.problems.append(f"{name} holds something else than finite numbers in {odd} of {len(rows)} rows.")
    return rows


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        return _mapping(json.loads(line))
    except (ValueError, RecursionError):
        return None


def _metrics(line: bytes) -> dict[str, Any] | None:
    row = metrics_row(line)
    too_large = row and any(isinstance(value, int) and abs(value) > sys.float_info.max for value in row.values())
    return None if too_large else row


def _parsed_lines(
    run: RunFiles, name: str, parse: Callable[[bytes], dict[str, Any] | None]
) -> tuple[list[dict[str, Any]], bool]:
    """The rows of a file, and whether all lines are among them; `run.problems` says which are not."""
    try:
        data = (run.folder / name).read_bytes()
    except OSError as error:
        run.problems.append(f"{name} cannot be read: {error.strerror}.")
        return [], False
    parsed = [parse(line) for line in data.splitlines()]
    rows = [row for row in parsed if row is not None]
    bad = [number for number, row in enumerate(parsed, 1) if row is None]
    whole = not bad and bool(rows)
    if not parsed:
        run.problems.append(f"{name} is empty.")
    elif not data.endswith(b"\n"):
        last = len(parsed)
        left_out = " That line is left out." if bad[-1:] == [last] else ""
        run.problems.append(f"{name} was cut off in its last line, {last}, as happens when a run is killed.{left_out}")
        bad = [number for number in bad if number != last]
    if bad:
        which = ", ".join(map(str, bad[:_NAMED_LINES])) + (
            f" and {len(bad) - _NAMED_LINES} more" if len(bad) > _NAMED_LINES else ""
        )
        run.problems.append(
            f"{name} cannot be read whole: of its {len(parsed)} lines {len(bad)} {'is' if len(bad) == 1 else 'are'} "
            f"broken and left out, line {which}."
        )
    return rows, whole


def holds_any(folder: Path, names: Sequence[str]) -> bool:
    """Whether one of the files is in the folder.

    Raises:
        UserError: nobody can say, since the folder cannot be looked into.
    """
    try:
        return any((folder / name).is_file() for name in names)
    except OSError as error:
        raise UserError(f"{folder} cannot be looked into: {error.strerror}.") from None


def write_page(path: Path, text: str) -> None:
    """Write a report of what was read.

    Raises:
        UserError: it cannot be written; what was there before still is.
    """
    try:
        # Half an emoji, of an answer that was cut, is no UTF-8.
        atomic_write_text(path, text.encode("utf-8", "replace").decode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def _scores(sample: dict[str, Any]) -> list[Any]:
    return [dig(verdict, "score") for verdict in submapping(sample, "verdicts").values()]


def read_run(folder: Path) -> RunFiles:
    """Read what is there.

    Raises:
        UserError: a folder without any file of a run, or one that cannot be looked into.
    """
    if not holds_any(folder, RUN_FILES):
        raise UserError(f"{folder} is no run folder: it holds none of {', '.join(RUN_FILES)}.")
    run = RunFiles(folder)

    def read(name: str, parse: Callable[[Path], Any], empty: Any) -> Any:
        path = folder / name
        if not path.exists():
            run.problems.append(f"{name} is missing.")
            return empty
        try:
            return parse(path)
        except OSError as error:
            run.problems.append(f"{name} cannot be read: {error.strerror}.")
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            run.problems.append(f"{name} cannot be read: {' '.join(str(error).split())}.")
        return empty

    run.config = read("config.yaml", _config, {})
    run.summary = read("summary.json", lambda path: _mapping(json.loads(path.read_text("utf-8"))), {})
    run.metrics, whole = read("metrics.jsonl", lambda path: _parsed_lines(run, path.name, _metrics), ([], False))
    run.has_gaps = not whole
    prompts = dig(run.summary, "evaluation", "prompts")
    if (folder / "samples.jsonl").exists() or prompts:
        run.samples = read("samples.jsonl", lambda path: read_rows(run, path.name, _scores), [])
    odd = [".".join(keys) for keys in _NUMBERS for keys in _no_numbers(dig(run.summary, *keys), keys)]
    if odd:
        which = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        run.problems.append(f"summary.json holds something else than a finite number for {which}.")
    return run


def _config(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8")
    if not text.endswith("\n"):  # half of a YAML file is a YAML file
        raise ValueError("it is cut off")
    return _mapping(yaml.safe_load(text))


def _no_numbers(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _no_numbers(inner, (*keys, str(key)))
    elif value is not None and not is_number(value):
        yield keys


def dig(value: Any, *keys: str) -> Any:
    """The value under a path of keys; None where the path ends early."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def submapping(value: Any, *keys: str) -> dict[str, Any]:
    """`get` of a mapping; empty where there is none."""
    found = dig(value, *keys)
    return found if isinstance(found, dict) else {}


def eval_pairs(summary: dict[str, Any]) -> int:
    """How many pairs, rows or lists were held out of the preference data; 0 where that is not known."""
    return as_count(dig(summary, "data", "preference", "eval"))


def as_count(value: Any) -> int:
    """How many, where that is what the value says; else 0."""
    return value if isinstance(value, int) and is_number(value) and value > 0 else 0


def loss_name(summary: dict[str, Any]) -> str:
    """The name of the preference loss, or of its stage where that is lost."""
    return str(dig(summary, "stages", "preference", "loss") or "preference")


def stopped_at(summary: dict[str, Any]) -> str:
    """Where a run was stopped early."""
    step, of_steps = (
        format_value(dig(summary, "stages", "preference", "stopped", key)) for key in ("step", "of_steps")
    )
    return f"stopped at step {step} of {of_steps}"


def status(summary: dict[str, Any]) -> str | None:
    """Whether the run is finished; of one that was stopped early also where and why. None where that is not known."""
    found, why = summary.get("status"), submapping(summary, "stages", "preference", "stopped")
    if found != "stopped" or not why:
        return None if found is None else format_value(found)
    rung, place, of_members = (format_value(why.get(key)) for key in ("rung", "place", "of_members"))
    metric, value = (format_value(why.get(key)) for key in ("metric", "value"))
    return f"{stopped_at(summary)}: at step {rung} number {place} of {of_members} members by {metric} ({value})"


def series(metrics: Sequence[dict[str, Any]], stage: str, split: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric, in the order of the rows."""
    points = [
        (row["step"], row[name])
        for row in metrics
        if row["stage"] == stage and row["split"] == split and is_number(row.get(name))
    ]
    return [step for step, _ in points], [value for _, value in points]


def first_and_last(run: RunFiles, name: str) -> tuple[float, float, str] | None:
    """First and last value of a preference metric, of the evaluation if it has two points, else of training.

    Where lines are lost it is known of an evaluation alone that was made at the start and at the end.
    """
    for split in ("eval", "train"):
        steps, values = series(run.metrics, "preference", split, name)
        if len(values) >= 2 and (not run.has_gaps or (steps[0] == 0 and _is_end(run, "preference", steps[-1]))):
            return values[0], values[-1], split
    return None


def _is_end(run: RunFiles, stage: str, step: int) -> bool:
    return bool(step == dig(run.summary, "stages", stage, "steps"))
