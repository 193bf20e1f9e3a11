"""The report of one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignment.evaluation.intervals import wilson_interval
from alignment.runs.cautions import cautions
from alignment.runs.folder import (
    MODEL_TITLES,
    RunFiles,
    as_count,
    dig,
    eval_pairs,
    loss_name,
    read_run,
    status,
    submapping,
    write_page,
)
from alignment.runs.plots import write_plots
from alignment.runs.record import STAGES
from alignment.runs.text import (
    DASH,
    MAX_SAMPLES,
    clip,
    escape_markdown,
    format_value,
    is_number,
    markdown_table,
    percent,
    short_hash,
)

_STAGE_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "nats/margins", "ranking/accuracies")
_ZERO = 1e-4


def _accuracy(share: Any, pairs: int) -> str:
    if not (is_number(share) and 0 <= share <= 1 and pairs):
        return percent(share)
    low, high = wilson_interval(share, pairs)
    return f"{percent(share)} ({percent(low)} to {percent(high)})"


def _margin(value: Any) -> str:
    return "0" if is_number(value) and abs(value) < _ZERO else format_value(value)


def _stage_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for stage in STAGES:
        entry = dig(summary, "stages", stage)
        if not isinstance(entry, dict):
            continue
        metrics = entry.get("metrics")
        final = [
            f"{split} {name} {format_value(dig(metrics, f'{split}/{name}'))}"
            for split in ("train", "eval")
            for name in (_STAGE_METRICS if split == "eval" else ("loss",))
            if dig(metrics, f"{split}/{name}") is not None
        ]
        title = "SFT" if stage == "sft" else loss_name(summary).upper()
        rows.append(
            [
                title,
                format_value(entry.get("steps")),
                format_value(entry.get("seconds")),
                format_value(entry.get("tokens_per_second")),
                ", ".join(final) or DASH,
            ]
        )
    return ["stage", "steps", "seconds", "tokens/s", "final metrics"], rows


def _win_rate(entry: Any) -> str:
    counts = " / ".join(format_value(dig(entry, key)) for key in ("wins", "ties", "losses"))
    low, high = percent(dig(entry, "low")), percent(dig(entry, "high"))
    return f"{percent(dig(entry, 'rate'))} ({low} to {high}), {counts}"


def _evaluation_table(summary: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Measures against models. Without the rows of metrics.jsonl the pairs are known for the final model only."""
    evaluation, final = summary.get("evaluation"), dig(summary, "stages", "preference", "metrics")
    first: dict[str, Any] = next(
        (row for row in metrics if row["stage"] == "preference" and row["split"] == "eval" and row["step"] == 0), {}
    )
    before = "sft" if dig(summary, "stages", "sft") else "start"
    models = [name for name in MODEL_TITLES if dig(evaluation, "answers", name) or (name == "final" and final)]
    if first and before not in models:
        models.insert(0, before)
    pairs = eval_pairs(summary)

    def answers(key: str, show: Callable[[Any], str]) -> Callable[[str], str]:
        return lambda model: show(dig(evaluation, "answers", model, key))

    def pair_metric(key: str, show: Callable[[Any], str]) -> Callable[[str], str]:
        def cell(model: str) -> str:
            if model == before and key == "rewards/accuracies" and abs(first.get("rewards/margins", 1.0)) < _ZERO:
                return DASH  # the policy is its own reference: the signs of its rewards are rounding
            return show(dig(final, f"eval/{key}") if model == "final" else first.get(key) if model == before else None)

        return cell

    def against(model: str) -> str:
        entry = dig(evaluation, "win_rate", f"final_vs_{model}")
        return _win_rate(entry) if entry else DASH

    def sampled_kl(model: str) -> str:
        if model != "final":
            return DASH
        mean, error = (dig(evaluation, "kl/sampled", key) for key in ("mean", "se"))
        if not (is_number(mean) and is_number(error)):
            return format_value(mean)
        low, high = (format_value(mean + z * error) for z in (-1.959964, 1.959964))
        return f"{format_value(mean)} ({low} to {high})"

    measures: list[tuple[str, Callable[[str], str]]] = [
        ("win rate of the final model against it, wins / ties / losses", against),
        ("judge score", answers("judge_score", format_value)),
        ("correct", answers("correct", percent)),
        ("direct: short, without hedge or chatter", answers("direct", percent)),
        ("mean length of answers, words", answers("words", format_value)),
        ("answers", answers("n", format_value)),
        ("reward accuracy on held-out pairs", pair_metric("rewards/accuracies", lambda v: _accuracy(v, pairs))),
        ("reward margin, the loss's units", pair_metric("rewards/margins", _margin)),
        ("margin against the reference, nats", pair_metric("nats/margins", _margin)),
        ("ranking accuracy of the policy alone", pair_metric("ranking/accuracies", lambda v: _accuracy(v, pairs))),
        ("KL to the start of the stage, nats per answer, from answers sampled of the policy", sampled_kl),
    ]
    rows = [[title, *[cell(model) for model in models]] for title, cell in measures]
    titles = [
        f"after {loss_name(summary).upper()}" if model == "final" and final else MODEL_TITLES[model] for model in models
    ]
    return ["measure", *titles], [row for row in rows if set(row[1:]) - {DASH}]


def _what_ran(run: RunFiles) -> list[tuple[str, str]]:
    config, summary = run.config, run.summary
    stages = summary.get("stages")
    loss = config.get("loss")
    settings = loss if isinstance(loss, dict) else submapping(stages, "preference", "settings")
    facts: list[tuple[str, Any]] = [
        ("recipe", summary.get("recipe")),
        ("status", status(summary) or "unfinished, or its summary is lost"),
        ("model", dig(config, "model", "name") or dig(summary, "model", "name")),
        ("quantisation", "none" if config and config.get("quantization") is None else "NF4" if config else None),
        (
            "adapter",
            "LoRA, r {}, alpha {}".format(*(format_value(dig(config, "adapter", key)) for key in ("r", "alpha")))
            if dig(config, "adapter")
            else "none: the whole model is trained"
            if config
            else None,
        ),
        ("SFT data", _data_line(run, "sft", dig(config, "sft", "data", "source"))),
        (
            "preference data",
            _data_line(run, "preference", dig(config, "data", "source")) if loss or not config else None,
        ),
        (
            "loss",
            f"{loss_name(summary)} ({', '.join(f'{key} {format_value(value)}' for key, value in settings.items())})"
            if settings or dig(stages, "preference")
            else None,
        ),
        ("seed", summary.get("seed", config.get("seed"))),
        ("seconds", summary.get("seconds")),
        (
            "identity of the final policy",
            dig(summary, "model", "final_identity") or dig(summary, "model", "identity"),
        ),
        ("commit", summary.get("git_commit")),
        ("machine", _joined(summary.get("machine"))),
        ("versions", _joined(summary.get("versions"))),
    ]
    return [(name, format_value(value)) for name, value in facts if value is not None]


def _data_line(run: RunFiles, stage: str, source: Any) -> str | None:
    info = dig(run.summary, "data", stage)
    parts = [str(source)] if source else []
    for key, title in (("train", "rows to train on"), ("eval", "held out"), ("fingerprint", "")):
        if dig(info, key) is not None:
            parts.append(f"{format_value(info[key])} {title}" if title else f"fingerprint {short_hash(info[key])}")
    return "; ".join(parts) or None


def _joined(mapping: Any) -> str | None:
    if not isinstance(mapping, dict):
        return None
    return ", ".join(f"{key} {format_value(value)}" for key, value in mapping.items() if value is not None)


def _reference_line(reference: Any) -> str | None:
    if not isinstance(reference, dict):
        return None
    order = ("mode", "identity", "hits", "misses", "spot_checks", "spot_check_max_diff", "seconds", "path")
    parts = [
        f"{key.replace('_', ' ')} {short_hash(reference[key]) if key == 'identity' else format_value(reference[key])}"
        for key in order
        if reference.get(key) is not None
    ]
    if isinstance(refreshes := reference.get("refreshes"), list):
        parts.append(f"refreshed from the policy {len(refreshes)} times")
    return escape_markdown(", ".join(parts))


def _sample_table(samples: Sequence[dict[str, Any]]) -> str:
    columns = [("prompt", "prompt")] + [
        (key, title) for key, title in MODEL_TITLES.items() if any(sample.get(key) is not None for sample in samples)
    ]
    picked = [
        samples[i * len(samples) // min(MAX_SAMPLES, len(samples))] for i in range(min(MAX_SAMPLES, len(samples)))
    ]
    rows = [[clip(sample.get(key)) for key, _ in columns] for sample in picked]
    return markdown_table([title for _, title in columns], rows)


def _plots(run: RunFiles) -> list[Path]:
    try:
        return write_plots(run.metrics, run.folder / "plots")
    except OSError as error:
        run.problems.append(f"plots cannot be written: {error.strerror}.")
        return []


def write_report(run_dir: Path) -> Path:
    """Write report.md, and the plots anew, from the files of a run folder; what is missing is named in the report.

    Raises:
        UserError: a folder without any file of a run, or one in which the report cannot be written.
    """
    run = read_run(run_dir)
    title = escape_markdown(str(run.summary.get("recipe") or run_dir.resolve().parent.name))
    parts = [f"# {title}, {escape_markdown(run_dir.resolve().name)}"]
    if found := cautions(run):
        parts += ["## Read this first", "\n".join(f"- {escape_markdown(warning.text)}" for warning in found)]
    header, rows = _evaluation_table(run.summary, run.metrics)
    if rows:
        parts += ["## Held-out evaluation", markdown_table([escape_markdown(cell) for cell in header], rows)]
        parts.append("In parentheses: 95% intervals. A tie counts as half a win.")
    header, rows = _stage_table(run.summary)
    if rows:
        parts += ["## Stages", markdown_table(header, rows)]
    if (together := as_count(dig(run.summary, "cohort", "size"))) > 1:
        parts.append(
            f"Up to {together} members of a sweep trained together in one process: in the seconds of the preference "
            "stage the others trained too, and tokens/s are this run's share of what the process did."
        )
    reference = _reference_line(run.summary.get("reference"))
    if reference:
        parts.append(f"Reference log-probs: {reference}.")
    parts += ["## What ran", markdown_table(["", ""], _what_ran(run))]
    if plots := _plots(run):
        links = [f"![{path.stem.replace('_', ' ')}](plots/{path.name})" for path in plots]
        parts += ["## Plots", "\n\n".join(links)]
    if run.samples:
        parts += ["## Samples", _sample_table(run.samples)]
        if (run_dir / "samples.md").is_file():
            parts.append(f"All {len(run.samples)} are in [samples.md](samples.md).")
    if run.problems:
        parts += ["## Not available", "\n".join(f"- {escape_markdown(problem)}" for problem in run.problems)]
    path = run_dir / "report.md"
    write_page(path, "\n\n".join(parts) + "\n")
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
