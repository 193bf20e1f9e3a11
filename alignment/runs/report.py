"""The report of one run: report.md in its folder, and the tables that the command prints at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from alignment.data.rows.reasons import in_words
from alignment.evaluation.calibration import Bin
from alignment.evaluation.intervals import wilson_interval
from alignment.losses import title as loss_title
from alignment.runs.calibration import HEADER, bins_of, calibration_rows
from alignment.runs.cautions import cautions
from alignment.runs.folder import (
    MODEL_TITLES,
    ZERO_MARGIN,
    RunFiles,
    as_count,
    dig,
    eval_pairs,
    is_rounding,
    loss_name,
    read_run,
    status,
    submapping,
    write_page,
)
from alignment.runs.judge_table import ABOUT_JUDGE, judge_rows
from alignment.runs.plots import write_plots, write_reliability
from alignment.runs.progress_tables import ABOUT_LOOKS, looks_table, rounds_table
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

_STAGE_ROWS = {
    "steps": ("steps",),
    "seconds": ("seconds",),
    "tokens/s": ("tokens_per_second",),
    "train/loss": ("metrics", "train/loss"),
    "eval/loss": ("metrics", "eval/loss"),
    "eval/rewards/accuracies": ("metrics", "eval/rewards/accuracies"),
    "eval/rewards/margins": ("metrics", "eval/rewards/margins"),
    "eval/nats/margins": ("metrics", "eval/nats/margins"),
    "eval/ranking/accuracies": ("metrics", "eval/ranking/accuracies"),
    "eval/kl/teacher": ("metrics", "eval/kl/teacher"),
}
"""Where the summary of a stage has each row of the table of stages. Metrics are named as in metrics.jsonl."""

ABOUT_EVALUATION = (
    "A tie counts as half a win. A direct answer is short and neither hedges nor chats. Accuracies and margins are of "
    "the held-out pairs: reward accuracy and reward margin use the loss's own reward, the margin vs the reference "
    "means the same for every loss, and ranking accuracy looks at the policy alone. The KL is estimated from answers "
    "that the policy sampled."
)

_ABOUT_CALIBRATION = (
    "Held-out pairs in bins of equal size. The model's choice is the answer with the higher reward; its probability "
    "is that of the Bradley-Terry model for the difference of the rewards. The calibration error is the mean "
    "difference of the two columns, some of which is chance."
)

Rows = list[list[str]]
"""Rows of a table; the first cell of each is its label."""


def _known(rows: Rows) -> Rows:
    """The rows that have a value."""
    return [row for row in rows if set(row[1:]) - {DASH}]


def stage_table(summary: dict[str, Any]) -> tuple[list[str], Rows]:
    """A column per stage, with what it took and its last metrics."""
    entries = {stage: submapping(summary, "stages", stage) for stage in STAGES}
    entries = {stage: entry for stage, entry in entries.items() if entry}
    rows = [
        [label, *(format_value(dig(entry, *keys)) for entry in entries.values())] for label, keys in _STAGE_ROWS.items()
    ]
    return ["stage", *("SFT" if stage == "sft" else loss_title(loss_name(summary)) for stage in entries)], _known(rows)


def evaluation_table(summary: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> tuple[list[str], Rows]:
    """A column per model, with what its answers and its log-probs of the held-out pairs are worth.

    The values before training come from the first row of `metrics`, and are missing if there is none.
    """
    evaluation, final = summary.get("evaluation"), submapping(summary, "stages", "preference", "metrics")
    first: dict[str, Any] = next(
        (row for row in metrics if row["stage"] == "preference" and row["split"] == "eval" and row["step"] == 0), {}
    )
    before = "sft" if dig(summary, "stages", "sft") else "start"
    models = [name for name in MODEL_TITLES if dig(evaluation, "answers", name) or (name == "final" and final)]
    if first and before not in models:
        models.insert(0, before)
    pairs = eval_pairs(summary)

    # A cell per model: of its answers, of its win rate, of its pairs
    def answers(key: str, show: Callable[[Any], str]) -> list[str]:
        return [show(dig(evaluation, "answers", model, key)) for model in models]

    def win_rate(show: Callable[[Any], str]) -> list[str]:
        entries = (dig(evaluation, "win_rate", f"final_vs_{model}") for model in models)
        return [show(entry) if entry else DASH for entry in entries]

    def of_pairs(name: str) -> list[Any]:
        values = {before: first.get(name)} | {"final": final.get(f"eval/{name}")}
        if is_rounding(first, name):
            values[before] = None
        return [values.get(model) for model in models]

    def accuracy(label: str, name: str) -> Rows:
        values = of_pairs(name)
        bounds = [wilson_interval(share, pairs) if is_number(share) and pairs else None for share in values]
        return [[label, *map(percent, values)], [_INTERVAL, *map(_range_of_shares, bounds)]]

    def margin(name: str) -> list[str]:
        return [
            "0" if is_number(value) and abs(value) < ZERO_MARGIN else format_value(value) for value in of_pairs(name)
        ]

    # The table
    kl, error = (dig(evaluation, "kl/sampled", key) for key in ("mean", "se"))
    around = DASH
    if is_number(kl) and is_number(error):
        around = " to ".join(format_value(kl + z * error) for z in (-1.959964, 1.959964))
    rows = [
        ["win rate of final model", *win_rate(lambda entry: percent(entry["rate"]))],
        [_INTERVAL, *win_rate(lambda entry: _range_of_shares((entry["low"], entry["high"])))],
        ["wins / ties / losses", *win_rate(lambda entry: "{wins} / {ties} / {losses}".format(**entry))],
        ["judge score", *answers("judge_score", format_value)],
        ["correct answers", *answers("correct", percent)],
        ["direct answers", *answers("direct", percent)],
        ["words per answer", *answers("words", format_value)],
        ["number of answers", *answers("n", format_value)],
        *accuracy("reward accuracy", "rewards/accuracies"),
        ["reward margin, own units", *margin("rewards/margins")],
        ["mean reward", *map(format_value, of_pairs("rewards/mean"))],
        ["calibration error", *map(percent, of_pairs("rewards/calibration_error"))],
        ["margin vs reference, nats", *margin("nats/margins")],
        *accuracy("ranking accuracy", "ranking/accuracies"),
        ["KL to teacher, nats/answer", *map(format_value, of_pairs("kl/teacher"))],
        ["KL to start, nats/answer", *(format_value(kl if model == "final" else None) for model in models)],
        [_INTERVAL, *(around if model == "final" else DASH for model in models)],
    ]
    after = MODEL_TITLES | ({"final": f"after {loss_title(loss_name(summary))}"} if final else {})
    return ["measure", *(after[model] for model in models)], _known(rows)


_INTERVAL = "  95% interval"
"""Label of a row that has the intervals of the row above it."""


def _range_of_shares(bounds: tuple[float, float] | None) -> str:
    return f"{percent(bounds[0])} to {percent(bounds[1])}" if bounds else DASH


def settings_and_data(run: RunFiles) -> list[tuple[str, str]]:
    """What the run was made of: a name and a value per row."""
    config, summary = run.config, run.summary
    loss = config.get("loss")
    settings = loss or submapping(summary, "stages", "preference", "settings")
    adapter = submapping(config, "adapter")
    facts: dict[str, Any] = {
        "recipe": summary.get("recipe"),
        "status": status(summary) or "unfinished, or its summary is lost",
        "model": dig(config, "model", "name") or dig(summary, "model", "name"),
    }
    if config:
        own = dig(summary, "model", "quantization") or "none"
        is_own = own != "none" and config.get("quantization") is None
        asked = _quantisation(submapping(config, "quantization"))
        facts["quantisation"] = f"{own}, as the checkpoint is stored" if is_own else asked
        facts["adapter"] = "none: the whole model is trained"
    if adapter:
        facts["adapter"] = _adapter_line(adapter)
    facts["weights of the base"] = dig(summary, "model", "stored")
    facts["SFT data"] = _data_line(run, "sft", dig(config, "sft", "data", "source"))
    if loss or not config:
        facts["preference data"] = _data_line(run, "preference", dig(config, "data", "source"))
    if settings or dig(summary, "stages", "preference"):
        facts["loss"] = f"{loss_title(loss_name(summary))} ({_listed(settings)})"
    facts |= {
        "seed": summary.get("seed", config.get("seed")),
        "seconds": summary.get("seconds"),
        "identity of the final policy": dig(summary, "model", "final_identity") or dig(summary, "model", "identity"),
        "commit": summary.get("git_commit"),
        "machine": _listed(submapping(summary, "machine")) or None,
        "versions": _listed(submapping(summary, "versions")) or None,
    }
    return [(name, format_value(value)) for name, value in facts.items() if value is not None]


_KINDS = {"lora": "LoRA", "dora": "DoRA", "vera": "VeRA", "oft": "OFT", "boft": "BOFT"}
_USUAL = {"target_modules": ["auto"], "init": "default", "lr_ratio": 1.0}


def _adapter_line(adapter: dict[str, Any]) -> str:
    """Its kind, and every setting that is not the usual one."""
    kind = _KINDS.get(str(adapter.get("kind", "lora")), "LoRA")
    told = {k: v for k, v in adapter.items() if v and k != "kind" and v != _USUAL.get(k)}
    parts = (f"{name} {format_value(value)}" if value is not True else name for name, value in told.items())
    return ", ".join([kind, *parts])


def _data_line(run: RunFiles, stage: str, source: Any) -> str | None:
    info = submapping(run.summary, "data", stage)
    mixed = submapping(info, "sources")
    parts = [f"a mixture of {', '.join(mixed)}"] if mixed else [str(source)] if source else []
    parts += [
        f"{format_value(info[key])} {title}"
        for key, title in (("train", "rows to train on"), ("eval", "held out"))
        if info.get(key) is not None
    ]
    for key in ("bad_rows", "dropped"):
        if counts := submapping(info, key):
            parts.append(f"left out: {in_words(counts)}")
    if info.get("fingerprint") is not None:
        parts.append(f"fingerprint {short_hash(info['fingerprint'])}")
    return "; ".join(parts) or None


_SOURCE_COLUMNS = {
    "rows": "of",
    "trained on": "train",
    "share": "share",
    "held out": "eval",
    "loss": "loss",
    "reward accuracy": "rewards/accuracies",
    "reward margin": "rewards/margins",
    "margin vs reference, nats": "nats/margins",
    "ranking accuracy": "ranking/accuracies",
}
"""The columns of the table of sources, with their names in the summary's data or among the metrics of a source."""


def _source_table(summary: dict[str, Any], stage: str) -> tuple[list[str], Rows]:
    """A row per source of a mixture: its share of the training, and how its held-out rows are at the end."""
    sources = submapping(summary, "data", stage, "sources")
    metrics = submapping(summary, "stages", stage, "metrics")
    shown: dict[str, list[str]] = {}
    for title, key in _SOURCE_COLUMNS.items():
        show = percent if title == "share" or title.endswith("accuracy") else format_value
        values = (facts.get(key, metrics.get(f"eval/{name}/{key}")) for name, facts in sources.items())
        cells = [show(value) for value in values]
        if set(cells) - {DASH}:
            shown[title] = cells
    return ["source", *shown], [[name, *cells] for name, *cells in zip(sources, *shown.values(), strict=True)]


def _quantisation(settings: Mapping[str, Any]) -> str:
    if not settings:
        return "none"
    objective = settings.get("calibration", "none")
    return "NF4" if objective == "none" else f"NF4, calibrated by {objective}"


def _listed(mapping: dict[str, Any]) -> str:
    return ", ".join(f"{key} {format_value(value)}" for key, value in mapping.items() if value is not None)


def _reference_line(reference: dict[str, Any]) -> str:
    order = ("mode", "identity", "hits", "misses", "spot_checks", "spot_check_max_diff", "seconds", "path")
    said = {key.replace("_", " "): reference.get(key) for key in order}
    if said["identity"] is not None:
        said["identity"] = short_hash(said["identity"])
    refreshes = reference.get("refreshes")
    return _listed(said) + (f", refreshed from the policy {len(refreshes)} times" if refreshes else "")


def _merged(merge: dict[str, Any]) -> list[str]:
    """What the policy was merged from, and how."""
    parents = merge.get("parents") or []
    columns = [parents, *(merge.get(key) or [DASH] * len(parents) for key in ("weights", "norms"))]
    rows = [[escape_markdown(str(parent)), *map(format_value, rest)] for parent, *rest in zip(*columns, strict=False)]
    density = f" Density {format_value(merge['density'])}." if merge.get("density") is not None else ""
    lines = [
        f"Method {escape_markdown(str(merge.get('method')))}: {escape_markdown(str(merge.get('computes')))}.{density}",
        markdown_table(["parent", "weight", "norm of its update"], rows),
    ]
    cosines = ", ".join(map(format_value, merge.get("cosines") or []))
    lines.append(
        f"The merged update has norm {format_value(merge.get('merged_norm'))}. Cosines between the parents' updates: "
        f"{cosines}; at 0 they have nothing in common, below 0 they undo each other."
    )
    if merge.get("rank") is not None:
        lines.append(
            f"Saved as an adapter of rank {format_value(merge['rank'])}, which leaves out "
            f"{percent(merge.get('error'))} of the merged update's norm."
        )
    return lines


def _sample_table(samples: Sequence[dict[str, Any]]) -> str:
    columns = {"prompt": "prompt"} | {
        key: title for key, title in MODEL_TITLES.items() if any(sample.get(key) is not None for sample in samples)
    }
    number = min(MAX_SAMPLES, len(samples))
    picked = [samples[i * len(samples) // number] for i in range(number)]
    return markdown_table(list(columns.values()), [[clip(sample.get(key)) for key in columns] for sample in picked])


def _plots(run: RunFiles, bins: Sequence[Bin]) -> list[Path]:
    try:
        plots = write_plots(run.metrics, run.folder / "plots")
        return [*plots, write_reliability(bins, run.folder / "plots")] if bins else plots
    except OSError as error:
        run.problems.append(f"plots cannot be written: {error.strerror}.")
        return []


def write_report(run_dir: Path) -> Path:
    """Write report.md and the plots of a run folder. The report names files that are missing or cannot be read.

    Raises:
        UserError: the folder holds no file of a run, or the report cannot be written there.
    """
    run = read_run(run_dir)
    title = escape_markdown(str(run.summary.get("recipe") or run_dir.resolve().parent.name))
    parts = [f"# {title}, {escape_markdown(run_dir.resolve().name)}"]
    if found := cautions(run):
        parts += ["## Read this first", "\n".join(f"- {escape_markdown(caution.text)}" for caution in found)]

    # Results
    header, rows = evaluation_table(run.summary, run.metrics)
    if rows:
        parts += ["## Held-out evaluation", markdown_table([escape_markdown(cell) for cell in header], rows)]
        parts.append(ABOUT_EVALUATION)
    if card := submapping(run.summary, "evaluation", "judge"):
        parts += ["## The judge", markdown_table(["", ""], judge_rows(card)), ABOUT_JUDGE]
    header, rows = looks_table(run.summary)
    if rows:
        parts += ["## Answers during training", markdown_table(header, rows), ABOUT_LOOKS]
    header, rows, about = rounds_table(run)
    if rows:
        parts += ["## Rounds", markdown_table(header, rows), about]
    bins = bins_of(run)
    if bins:
        parts += ["## Calibration", markdown_table(HEADER, calibration_rows(bins)), _ABOUT_CALIBRATION]
    header, rows = stage_table(run.summary)
    if rows:
        parts += ["## Stages", markdown_table([escape_markdown(cell) for cell in header], rows)]
    for stage in STAGES:
        header, rows = _source_table(run.summary, stage)
        if rows:
            parts.append(f"Sources of the {'SFT' if stage == 'sft' else 'preference'} data, held out at the end:")
            parts.append(markdown_table(header, rows))
    if (together := as_count(dig(run.summary, "cohort", "size"))) > 1:
        parts.append(
            f"Up to {together} members of a sweep trained together in one process: the seconds of the preference "
            "stage include the others' training, and tokens/s are this run's share."
        )

    # What ran, and what it left
    if submapping(run.summary, "merge"):
        parts += ["## What was merged", *_merged(submapping(run.summary, "merge"))]
    if steps := submapping(run.summary, "export", "drift"):
        to_merged, again, both = (format_value(steps.get(key)) for key in ("merged", "requantised", "together"))
        parts.append(
            f"From the adapter on NF4 to the merged model next-token log-probs drift by {to_merged} nats, from there "
            f"to NF4 again by {again}, together by {both}: the mean over tokens as the policy draws them. Ship what "
            f"you have evaluated."
        )
    if reference := submapping(run.summary, "reference"):
        parts.append(f"Reference log-probs: {escape_markdown(_reference_line(reference))}.")
    parts += ["## What ran", markdown_table(["", ""], settings_and_data(run))]
    if plots := _plots(run, bins):
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
    """Print the tables of stages and of the evaluation, and the paths of all files.

    A row is one line, in a pipe too: it is never broken, and the tables fit into 80 columns.
    """
    console = console or Console()

    def show(title: str, rows: Rows) -> None:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        console.print(f"\n{title}", style="bold")
        for row in rows:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            console.print(Text(line.rstrip()), soft_wrap=True)

    header, rows = stage_table(summary)
    if rows:
        show("Stages", [header, *rows])
    header, rows = evaluation_table(summary, [])
    if rows:
        show("Held-out evaluation", [header, *rows])
    if files := submapping(summary, "files"):
        show("Files", [[name, str(path)] for name, path in files.items()])
