"""The report of one run, from the files in its folder alone; `python -m alignment.report RUN_DIR...` rewrites it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment.errors import UserError
from alignment.plots import series, write_plots
from alignment.records import STAGES, atomic_write_text, escape_markdown, read_metrics

SAMPLES = 8
"""How many samples a report shows."""

_SAMPLE_CHARACTERS = 700
_RUN_FILES = ("config.yaml", "summary.json", "metrics.jsonl")
_MODELS = {"start": "before training", "sft": "after SFT", "final": "final"}
_STAGE_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "nats/margins", "ranking/accuracies")
_NONE = "-"
_ZERO = 1e-4


@dataclass(slots=True)
class _Run:
    """What could be read of a run folder; `problems` has a sentence for everything else."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    plots: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it holds no mapping")
    return value


def _rows(text: str) -> list[dict[str, Any]]:
    return [_mapping(json.loads(line)) for line in text.splitlines() if line.strip()]


def _load(folder: Path) -> _Run:
    if not any((folder / name).is_file() for name in _RUN_FILES):
        raise UserError(f"{folder} is no run folder: it holds none of {', '.join(_RUN_FILES)}.")
    run = _Run(folder)

    def read(name: str, parse: Callable[[Path], Any], empty: Any) -> Any:
        path = folder / name
        if not path.exists():
            run.problems.append(f"{name} is missing.")
            return empty
        try:
            return parse(path)
        except UserError as error:
            run.problems.append(str(error))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            run.problems.append(f"{name} cannot be read: {' '.join(str(error).split())}.")
        return empty

    run.config = read("config.yaml", lambda path: _mapping(yaml.safe_load(path.read_text("utf-8"))), {})
    run.summary = read("summary.json", lambda path: _mapping(json.loads(path.read_text("utf-8"))), {})
    run.metrics = read("metrics.jsonl", read_metrics, [])
    prompts = _get(run.summary, "evaluation", "prompts")
    if (folder / "samples.jsonl").exists() or prompts:
        run.samples = read("samples.jsonl", lambda path: _rows(path.read_text("utf-8")), [])
    run.plots = write_plots(run.metrics, folder / "plots")
    return run


def _get(value: Any, *keys: str) -> Any:
    """The value under a path of keys; None where the path ends early."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _section(value: Any, *keys: str) -> dict[str, Any]:
    """`_get` of a mapping; empty where there is none."""
    found = _get(value, *keys)
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    """A number to 4 digits, a mapping in brackets, anything else as it is, nothing as a dash."""
    if value is None or value == "":
        return _NONE
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {_text(inner)}' for key, inner in value.items())})"
    return str(value)


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}%" if _is_number(value) else _text(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every cell is escaped here and nowhere else."""
    lines = [header, ["---"] * len(header), *[[escape_markdown(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share observed among `count` independent cases, after Wilson (1927)."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return centre - half, centre + half


def _eval_pairs(summary: dict[str, Any]) -> int:
    count = _get(summary, "data", "preference", "eval")
    return count if isinstance(count, int) else 0


def _accuracy(share: Any, pairs: int) -> str:
    if not (_is_number(share) and 0 <= share <= 1 and pairs):
        return _percent(share)
    low, high = wilson_interval(share, pairs)
    return f"{_percent(share)} ({_percent(low)} to {_percent(high)})"


def _margin(value: Any) -> str:
    return "0" if _is_number(value) and abs(value) < _ZERO else _text(value)


def _loss_name(summary: dict[str, Any]) -> str:
    return str(_get(summary, "stages", "preference", "loss") or "preference")


def _stage_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for stage in STAGES:
        entry = _get(summary, "stages", stage)
        if not isinstance(entry, dict):
            continue
        metrics = entry.get("metrics")
        final = [
            f"{split} {name} {_text(_get(metrics, f'{split}/{name}'))}"
            for split in ("train", "eval")
            for name in (_STAGE_METRICS if split == "eval" else ("loss",))
            if _get(metrics, f"{split}/{name}") is not None
        ]
        title = "SFT" if stage == "sft" else _loss_name(summary).upper()
        rows.append(
            [
                title,
                _text(entry.get("steps")),
                _text(entry.get("seconds")),
                _text(entry.get("tokens_per_second")),
                ", ".join(final) or _NONE,
            ]
        )
    return ["stage", "steps", "seconds", "tokens/s", "final metrics"], rows


def _win_rate(entry: Any) -> str:
    counts = " / ".join(_text(_get(entry, key)) for key in ("wins", "ties", "losses"))
    low, high = _percent(_get(entry, "low")), _percent(_get(entry, "high"))
    return f"{_percent(_get(entry, 'rate'))} ({low} to {high}), {counts}"


def _evaluation_table(summary: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Measures against models. Without the rows of metrics.jsonl the pairs are known for the final model only."""
    evaluation, final = summary.get("evaluation"), _get(summary, "stages", "preference", "metrics")
    first: dict[str, Any] = next(
        (row for row in metrics if row["stage"] == "preference" and row["split"] == "eval" and row["step"] == 0), {}
    )
    before = "sft" if _get(summary, "stages", "sft") else "start"
    models = [name for name in _MODELS if _get(evaluation, "answers", name) or (name == "final" and final)]
    if first and before not in models:
        models.insert(0, before)
    pairs = _eval_pairs(summary)

    def answers(key: str, show: Callable[[Any], str]) -> Callable[[str], str]:
        return lambda model: show(_get(evaluation, "answers", model, key))

    def pair_metric(key: str, show: Callable[[Any], str]) -> Callable[[str], str]:
        def cell(model: str) -> str:
            if model == before and key == "rewards/accuracies" and abs(first.get("rewards/margins", 1.0)) < _ZERO:
                return _NONE  # the policy is its own reference: the signs of its rewards are rounding
            return show(_get(final, f"eval/{key}") if model == "final" else first.get(key) if model == before else None)

        return cell

    def against(model: str) -> str:
        entry = _get(evaluation, "win_rate", f"final_vs_{model}")
        return _win_rate(entry) if entry else _NONE

    measures: list[tuple[str, Callable[[str], str]]] = [
        ("win rate of the final model against it, wins / ties / losses", against),
        ("judge score", answers("judge_score", _text)),
        ("correct", answers("correct", _percent)),
        ("direct: short, without hedge or chatter", answers("direct", _percent)),
        ("mean length of answers, words", answers("words", _text)),
        ("answers", answers("n", _text)),
        ("reward accuracy on held-out pairs", pair_metric("rewards/accuracies", lambda v: _accuracy(v, pairs))),
        ("reward margin, the loss's units", pair_metric("rewards/margins", _margin)),
        ("margin against the reference, nats", pair_metric("nats/margins", _margin)),
        ("ranking accuracy of the policy alone", pair_metric("ranking/accuracies", lambda v: _accuracy(v, pairs))),
    ]
    rows = [[title, *[cell(model) for model in models]] for title, cell in measures]
    titles = [
        f"after {_loss_name(summary).upper()}" if model == "final" and final else _MODELS[model] for model in models
    ]
    return ["measure", *titles], [row for row in rows if set(row[1:]) - {_NONE}]


def _change(run: _Run, name: str) -> tuple[float, float, str] | None:
    """First and last value of a preference metric, of the evaluation if it has two points, else of training."""
    for split in ("eval", "train"):
        _, values = series(run.metrics, "preference", split, name)
        if len(values) >= 2:
            return values[0], values[-1], split
    return None


def _warnings(run: _Run) -> list[str]:
    """What a careful reader would ask about before trusting the result."""
    found = []
    summary = run.summary
    broken = sum(1 for row in run.metrics if any(isinstance(v, float) and not math.isfinite(v) for v in row.values()))
    if broken:
        found.append(f"{broken} rows of metrics.jsonl hold NaN or Infinity: the run became numerically unstable.")
    change = _change(run, "logps/chosen")
    if change and change[1] < change[0] - 1:
        before, after, split = change
        found.append(
            f"The log-prob of chosen completions fell by {before - after:.1f} nats ({split}, {before:.1f} to "
            f"{after:.1f}): what margin there is comes from rejected ones falling more."
        )
    for stage in STAGES:
        steps, values = series(run.metrics, stage, "eval", "loss")
        best = min(values, default=0.0)
        if values and values[-1] - best > 0.02 * abs(best):
            at = steps[values.index(best)]
            found.append(
                f"The held-out loss of the {'SFT' if stage == 'sft' else stage} stage was lowest at step {at} "
                f"({_text(best)}) and ended at {_text(values[-1])}: fewer steps might do better."
            )
    accuracy, pairs = _get(summary, "stages", "preference", "metrics", "eval/rewards/accuracies"), _eval_pairs(summary)
    if _is_number(accuracy) and 0 <= accuracy <= 1 and pairs:
        low, high = wilson_interval(accuracy, pairs)
        if low <= 0.5 <= high:
            found.append(
                f"The reward accuracy of {_percent(accuracy)} on {pairs} held-out pairs cannot be told from chance "
                f"(95% interval {_percent(low)} to {_percent(high)})."
            )
    for name, entry in _section(summary, "evaluation", "win_rate").items():
        low, high = _get(entry, "low"), _get(entry, "high")
        if _is_number(low) and _is_number(high) and low <= 0.5 <= high:
            other = _MODELS.get(name.removeprefix("final_vs_"), name)
            found.append(
                f"The win rate against the model {other} cannot be told from a draw "
                f"(95% interval {_percent(low)} to {_percent(high)})."
            )
    answers = _section(summary, "evaluation", "answers")
    words, correct = (
        {model: _get(answers, model, key) for model in _MODELS if _is_number(_get(answers, model, key))}
        for key in ("words", "correct")
    )
    earlier = "sft" if "sft" in words else "start"
    if "final" in words and words.get(earlier, 0) > 0 and words["final"] > 1.2 * words[earlier]:
        found.append(
            f"Answers grew from {words[earlier]:.1f} ({_MODELS[earlier]}) to {words['final']:.1f} words: judges "
            "often prefer length, so part of a win may be nothing else."
        )
    ablest = max(correct, key=lambda model: correct[model], default="final")
    if "final" in correct and correct[ablest] > correct["final"]:
        found.append(
            f"Fewer answers are correct at the end ({_percent(correct['final'])}) than {_MODELS[ablest]} "
            f"({_percent(correct[ablest])})."
        )
    return found


def _what_ran(run: _Run) -> list[tuple[str, str]]:
    config, summary = run.config, run.summary
    stages = summary.get("stages")
    loss = config.get("loss")
    settings = loss if isinstance(loss, dict) else _section(stages, "preference", "settings")
    facts: list[tuple[str, Any]] = [
        ("recipe", summary.get("recipe")),
        ("status", summary.get("status", "unfinished, or its summary is lost")),
        ("model", _get(config, "model", "name") or _get(summary, "model", "name")),
        ("quantisation", "none" if config and config.get("quantization") is None else "NF4" if config else None),
        (
            "adapter",
            f"LoRA, r {_text(_get(config, 'adapter', 'r'))}, alpha {_text(_get(config, 'adapter', 'alpha'))}"
            if _get(config, "adapter")
            else "none: the whole model is trained"
            if config
            else None,
        ),
        ("SFT data", _data_line(run, "sft", _get(config, "sft", "data", "source"))),
        (
            "preference data",
            _data_line(run, "preference", _get(config, "data", "source")) if loss or not config else None,
        ),
        (
            "loss",
            f"{_loss_name(summary)} ({', '.join(f'{key} {_text(value)}' for key, value in settings.items())})"
            if settings or _get(stages, "preference")
            else None,
        ),
        ("seed", summary.get("seed", config.get("seed"))),
        ("seconds", summary.get("seconds")),
        (
            "identity of the final policy",
            _get(summary, "model", "final_identity") or _get(summary, "model", "identity"),
        ),
        ("commit", summary.get("git_commit")),
        ("machine", _joined(summary.get("machine"))),
        ("versions", _joined(summary.get("versions"))),
    ]
    return [(name, _text(value)) for name, value in facts if value is not None]


def _data_line(run: _Run, stage: str, source: Any) -> str | None:
    info = _get(run.summary, "data", stage)
    parts = [str(source)] if source else []
    for key, title in (("train", "rows to train on"), ("eval", "held out"), ("fingerprint", "")):
        if _get(info, key) is not None:
            parts.append(f"{_text(info[key])} {title}" if title else f"fingerprint {_short(info[key])}")
    return "; ".join(parts) or None


def _joined(mapping: Any) -> str | None:
    if not isinstance(mapping, dict):
        return None
    return ", ".join(f"{key} {_text(value)}" for key, value in mapping.items() if value is not None)


def _reference_line(reference: Any) -> str | None:
    if not isinstance(reference, dict):
        return None
    order = ("mode", "identity", "hits", "misses", "spot_checks", "spot_check_max_diff", "seconds", "path")
    parts = [
        f"{key.replace('_', ' ')} {_short(reference[key]) if key == 'identity' else _text(reference[key])}"
        for key in order
        if reference.get(key) is not None
    ]
    if isinstance(refreshes := reference.get("refreshes"), list):
        parts.append(f"refreshed from the policy {len(refreshes)} times")
    return escape_markdown(", ".join(parts))


def _short(digest: Any) -> str:
    """Enough of a hash to tell it from others; the whole is in summary.json."""
    return str(digest)[:16]


def _cut(value: Any) -> str:
    text = str(value) if value is not None else _NONE
    return text if len(text) <= _SAMPLE_CHARACTERS else text[:_SAMPLE_CHARACTERS] + " ..."


def _sample_table(samples: Sequence[dict[str, Any]]) -> str:
    columns = [("prompt", "prompt")] + [
        (key, title) for key, title in _MODELS.items() if any(sample.get(key) is not None for sample in samples)
    ]
    picked = [samples[i * len(samples) // min(SAMPLES, len(samples))] for i in range(min(SAMPLES, len(samples)))]
    rows = [[_cut(sample.get(key)) for key, _ in columns] for sample in picked]
    return _table([title for _, title in columns], rows)


def write_report(run_dir: Path) -> Path:
    """Write report.md, and the plots anew, from the files of a run folder; what is missing is named in the report.

    Raises:
        UserError: a folder without any file of a run.
    """
    run = _load(run_dir)
    title = escape_markdown(str(run.summary.get("recipe") or run_dir.resolve().parent.name))
    parts = [f"# {title}, {escape_markdown(run_dir.resolve().name)}"]
    warnings = _warnings(run)
    if warnings:
        parts += ["## Read this first", "\n".join(f"- {escape_markdown(warning)}" for warning in warnings)]
    header, rows = _evaluation_table(run.summary, run.metrics)
    if rows:
        parts += ["## Held-out evaluation", _table([escape_markdown(cell) for cell in header], rows)]
        parts.append("In parentheses: 95% intervals. A tie counts as half a win.")
    header, rows = _stage_table(run.summary)
    if rows:
        parts += ["## Stages", _table(header, rows)]
    reference = _reference_line(run.summary.get("reference"))
    if reference:
        parts.append(f"Reference log-probs: {reference}.")
    parts += ["## What ran", _table(["", ""], _what_ran(run))]
    if run.plots:
        links = [f"![{path.stem.replace('_', ' ')}](plots/{path.name})" for path in run.plots]
        parts += ["## Plots", "\n\n".join(links)]
    if run.samples:
        parts += ["## Samples", _sample_table(run.samples)]
        if (run_dir / "samples.md").is_file():
            parts.append(f"All {len(run.samples)} are in [samples.md](samples.md).")
    if run.problems:
        parts += ["## Not available", "\n".join(f"- {escape_markdown(problem)}" for problem in run.problems)]
    path = run_dir / "report.md"
    atomic_write_text(path, "\n\n".join(parts) + "\n")
    return path


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables of stages and of the evaluation, and where everything was written."""
    console = console or Console()
    for title, (header, rows) in (
        ("Stages", _stage_table(summary)),
        ("Held-out evaluation", _evaluation_table(summary, [])),
    ):
        if rows:
            table = Table(title=title, title_justify="left")
            for cell in header:
                table.add_column(Text(cell))
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            console.print(table)
    files = summary.get("files")
    if isinstance(files, dict):
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, path in files.items():
            grid.add_row(Text(str(name)), Text(str(path)))
        console.print(grid)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the reports of the given run folders; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m alignment.report", description="Rewrite the reports of runs.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run")
    status = 0
    for folder in parser.parse_args(arguments).run_dirs:
        try:
            sys.stdout.write(f"{write_report(folder)}\n")
        except UserError as error:
            sys.stderr.write(f"Error: {error}\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
