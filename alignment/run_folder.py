"""What the files of a run folder say: read with care, put into words, and questioned as a careful reader would."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from alignment.errors import UserError
from alignment.records import STAGES, atomic_write_text, escape_markdown, metrics_row

SAMPLES = 8
"""How many samples a report shows."""

_CHARACTERS = 700
"""Of a sample that a report shows."""

RUN_FILES = ("config.yaml", "summary.json", "metrics.jsonl")

_DEEPEST = 50
"""Levels within each other of a file: no run writes as many, and far more end the interpreter."""
_FEW = 3
"""Broken lines of a file that are named."""

_NUMBERS = (
    *(("stages", stage, "metrics") for stage in STAGES),
    *(("evaluation", part) for part in ("answers", "win_rate", "kl/sampled")),
)
"""Sections of a summary that hold numbers alone."""


MODELS = {"start": "before training", "sft": "after SFT", "final": "final"}


NONE = "-"


@dataclass(slots=True)
class Run:
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


def read_rows(run: Run, name: str, numbers: Callable[[dict[str, Any]], Sequence[Any]]) -> list[dict[str, Any]]:
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
    run: Run, name: str, parse: Callable[[bytes], dict[str, Any] | None]
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
        which = ", ".join(map(str, bad[:_FEW])) + (f" and {len(bad) - _FEW} more" if len(bad) > _FEW else "")
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
    return [get(verdict, "score") for verdict in section(sample, "verdicts").values()]


def read_run(folder: Path) -> Run:
    """Read what is there.

    Raises:
        UserError: a folder without any file of a run, or one that cannot be looked into.
    """
    if not holds_any(folder, RUN_FILES):
        raise UserError(f"{folder} is no run folder: it holds none of {', '.join(RUN_FILES)}.")
    run = Run(folder)

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
    prompts = get(run.summary, "evaluation", "prompts")
    if (folder / "samples.jsonl").exists() or prompts:
        run.samples = read("samples.jsonl", lambda path: read_rows(run, path.name, _scores), [])
    odd = [".".join(keys) for keys in _NUMBERS for keys in _no_numbers(get(run.summary, *keys), keys)]
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


def get(value: Any, *keys: str) -> Any:
    """The value under a path of keys; None where the path ends early."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def section(value: Any, *keys: str) -> dict[str, Any]:
    """`get` of a mapping; empty where there is none."""
    found = get(value, *keys)
    return found if isinstance(found, dict) else {}


def is_number(value: Any) -> bool:
    """A finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def shown(value: Any) -> str:
    """A number to 4 digits, a mapping in brackets, anything else as it is, nothing as a dash."""
    if value is None or value == "":
        return NONE
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {shown(inner)}' for key, inner in value.items())})"
    return str(value)


def cut(value: Any) -> str:
    """As much of a text of a model as a report shows."""
    text = str(value) if value is not None else NONE
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS] + " ..."


def percent(value: Any) -> str:
    """A share in percent; anything else as `shown`."""
    return f"{100 * value:.1f}%" if is_number(value) else shown(value)


def short(digest: Any) -> str:
    """Enough of a hash to tell it from others; the whole is in summary.json."""
    return str(digest)[:16]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every cell is escaped here and nowhere else."""
    lines = [header, ["---"] * len(header), *[[escape_markdown(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share observed among `count` independent cases, after Wilson (1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def eval_pairs(summary: dict[str, Any]) -> int:
    """How many pairs, rows or lists were held out of the preference data; 0 where that is not known."""
    return count(get(summary, "data", "preference", "eval"))


def count(value: Any) -> int:
    """How many, where that is what the value says; else 0."""
    return value if isinstance(value, int) and is_number(value) and value > 0 else 0


def loss_name(summary: dict[str, Any]) -> str:
    """The name of the preference loss, or of its stage where that is lost."""
    return str(get(summary, "stages", "preference", "loss") or "preference")


def stopped_at(summary: dict[str, Any]) -> str:
    """Where a run was stopped early."""
    step, of_steps = (shown(get(summary, "stages", "preference", "stopped", key)) for key in ("step", "of_steps"))
    return f"stopped at step {step} of {of_steps}"


def status(summary: dict[str, Any]) -> str | None:
    """Whether the run is finished; of one that was stopped early also where and why. None where that is not known."""
    found, why = summary.get("status"), section(summary, "stages", "preference", "stopped")
    if found != "stopped" or not why:
        return None if found is None else shown(found)
    rung, place, of_members = (shown(why.get(key)) for key in ("rung", "place", "of_members"))
    return (
        f"{stopped_at(summary)}: at step {rung} number {place} of {of_members} members by {shown(why.get('metric'))} "
        f"({shown(why.get('value'))})"
    )


def series(metrics: Sequence[dict[str, Any]], stage: str, split: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one metric, in the order of the rows."""
    points = [
        (row["step"], row[name])
        for row in metrics
        if row["stage"] == stage and row["split"] == split and is_number(row.get(name))
    ]
    return [step for step, _ in points], [value for _, value in points]


def change(run: Run, name: str) -> tuple[float, float, str] | None:
    """First and last value of a preference metric, of the evaluation if it has two points, else of training.

    Where lines are lost it is known of an evaluation alone that was made at the start and at the end.
    """
    for split in ("eval", "train"):
        steps, values = series(run.metrics, "preference", split, name)
        if len(values) >= 2 and (not run.has_gaps or (steps[0] == 0 and _is_end(run, "preference", steps[-1]))):
            return values[0], values[-1], split
    return None


def _is_end(run: Run, stage: str, step: int) -> bool:
    return bool(step == get(run.summary, "stages", stage, "steps"))


class Warned(NamedTuple):
    """A reason for care: its kind, the same words for every run, and what it is in this run."""

    kind: str
    text: str


def warnings(run: Run) -> list[Warned]:
    """What a careful reader would ask about before trusting the result."""
    found: list[Warned] = []

    def warn(kind: str, text: str) -> None:
        found.append(Warned(kind, text))

    summary = run.summary
    broken = sum(1 for row in run.metrics if any(isinstance(v, float) and not math.isfinite(v) for v in row.values()))
    if broken:
        warn(
            "The run became numerically unstable",
            f"{broken} rows of metrics.jsonl hold NaN or Infinity: the run became numerically unstable.",
        )
    drift = change(run, "logps/chosen")
    if drift and drift[1] < drift[0] - 1:
        before, after, split = drift
        warn(
            "The log-prob of chosen completions fell",
            f"The log-prob of chosen completions fell by {before - after:.1f} nats ({split}, {before:.1f} to "
            f"{after:.1f}): what margin there is comes from rejected ones falling more.",
        )
    for stage in STAGES:
        steps, values = series(run.metrics, stage, "eval", "loss")
        best = min(values, default=0.0)
        if run.has_gaps and not (steps and _is_end(run, stage, steps[-1])):
            continue
        if values and values[-1] - best > 0.02 * abs(best):
            at = steps[values.index(best)]
            warn(
                "The held-out loss rose again",
                f"The held-out loss of the {'SFT' if stage == 'sft' else stage} stage was lowest at step {at} "
                f"({shown(best)}) and ended at {shown(values[-1])}: fewer steps might do better.",
            )
    accuracy, pairs = get(summary, "stages", "preference", "metrics", "eval/rewards/accuracies"), eval_pairs(summary)
    if is_number(accuracy) and 0 <= accuracy <= 1 and pairs:
        low, high = wilson_interval(accuracy, pairs)
        if low <= 0.5 <= high:
            warn(
                "Reward accuracy cannot be told from chance",
                f"The reward accuracy of {percent(accuracy)} on {pairs} held-out pairs cannot be told from chance "
                f"(95% interval {percent(low)} to {percent(high)}).",
            )
    for name, entry in section(summary, "evaluation", "win_rate").items():
        low, high = get(entry, "low"), get(entry, "high")
        if is_number(low) and is_number(high) and low <= 0.5 <= high:
            other = MODELS.get(name.removeprefix("final_vs_"), name)
            warn(
                "A win rate cannot be told from a draw",
                f"The win rate against the model {other} cannot be told from a draw "
                f"(95% interval {percent(low)} to {percent(high)}).",
            )
    answers = section(summary, "evaluation", "answers")
    words, correct = (
        {model: get(answers, model, key) for model in MODELS if is_number(get(answers, model, key))}
        for key in ("words", "correct")
    )
    earlier = "sft" if "sft" in words else "start"
    if "final" in words and words.get(earlier, 0) > 0 and words["final"] > 1.2 * words[earlier]:
        warn(
            "Answers grew longer",
            f"Answers grew from {words[earlier]:.1f} ({MODELS[earlier]}) to {words['final']:.1f} words: judges "
            "often prefer length, so part of a win may be nothing else.",
        )
    ablest = max(correct, key=lambda model: correct[model], default="final")
    if "final" in correct and correct[ablest] > correct["final"]:
        warn(
            "Fewer answers are correct than before",
            f"Fewer answers are correct at the end ({percent(correct['final'])}) than {MODELS[ablest]} "
            f"({percent(correct[ablest])}).",
        )
    return found
