"""A student's runs on one page to hand in: what was asked for, what came out, and whether the files still say so.

The page is made of the run folders alone and is the same every time, so whoever has the folders can make it again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from alignment.comparison import is_run
from alignment.comparison.answers import Questions, questions
from alignment.comparison.members import ComparedRun, read_member, short_names
from alignment.comparison.page import result_tables
from alignment.comparison.ranking import Comparison, compare
from alignment.comparison.sentences import cautions, counted, headline, overview
from alignment.comparison.tables import Table
from alignment.config.compose import recipe_settings
from alignment.config.renamed import flat
from alignment.course.figures import as_address, metric_curves
from alignment.errors import UserError
from alignment.files import file_digest, redact
from alignment.pages import page_templates
from alignment.runs.folder import (
    RUN_FILES,
    UNCHANGED,
    as_count,
    dig,
    sealed_files,
    series,
    status,
    write_page,
)
from alignment.runs.record import SEAL
from alignment.runs.report import evaluation_table, settings_and_data, stage_table
from alignment.runs.style import COLOURS
from alignment.runs.text import DASH, format_value, is_number, short_hash

_TEMPLATES = page_templates(Path(__file__).parent)

_CURVES = (
    ("sft", "loss", "Loss of the SFT stage", "nats per token", None),
    ("preference", "nats/margins", "Margin over the reference: comparable between losses", "nats", 0.0),
    ("preference", "nats/accuracies", "Reward accuracy, by the log-ratio to the reference", "share of pairs", 0.5),
    ("preference", "logps/chosen", "Log-prob of the chosen answers", "nats", None),
    ("preference", "rewards/margins", "Margin in each loss's own units: not comparable", "own units", 0.0),
)
"""Stage, metric, title, vertical axis and level of each figure."""

_SAME_FOR_ALL = ("tracking", "resume")
"""Settings that say nothing about a result."""

_LONGEST_LABEL = 60
"""Characters of a run's name in a figure."""


@dataclass(frozen=True, slots=True)
class _Figure:
    """A figure as an address that holds its picture."""

    title: str
    picture: str


@dataclass(frozen=True, slots=True)
class _Run:
    """One run: its number on the page, its name, whether its numbers can be shown, what is wrong, and its tables."""

    number: int
    name: str
    is_whole: bool
    problems: list[str]
    tables: list[Table]


@dataclass(frozen=True, slots=True)
class _Experiment:
    """The runs of one folder, compared."""

    name: str
    overview: str
    headline: list[str]
    cautions: list[tuple[str, list[str]]]
    figures: list[_Figure]
    tables: list[Table]
    asked: Questions
    runs: list[_Run]


def write_hand_in(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of all runs in and below these folders; runs of one folder are an experiment and are compared.

    Raises:
        UserError: there is no run, the path does not end in .html, or the page cannot be written.
    """
    if path.suffix != ".html":
        raise UserError(f"--hand-in={path} must be a file that ends in .html.")
    found = list(dict.fromkeys(run for folder in folders for run in _runs_below(folder.resolve())))
    if not found:
        given = ", ".join(map(str, folders))
        raise UserError(f"{given}: neither there nor below is a run; a run folder holds any of {', '.join(RUN_FILES)}.")
    by_folder: dict[Path, list[ComparedRun]] = {}
    for run, name in zip(found, short_names(found), strict=True):
        by_folder.setdefault(run.parent, []).append(read_member(run, name))
    groups = sorted(by_folder.values(), key=lambda several: min(map(_begun, several)))
    members = [member for several in groups for member in several]
    numbers = {member.name: number for number, member in enumerate(members, 1)}
    experiments = [_experiment(several, numbers) for several in groups]
    changed = [f"Run {run.number}: {problem}" for one in experiments for run in one.runs for problem in run.problems]
    page = _TEMPLATES.get_template("hand_in.html.j2").render(
        title=path.stem,
        overview=_overview(members, len(experiments)),
        changed=changed,
        all_runs=_all_runs(members, numbers),
        experiments=experiments,
        shade_colours=COLOURS[:2],
    )
    write_page(path, page)
    return path


def _runs_below(folder: Path) -> list[Path]:
    """The run folders in and below a folder, in the order of their names; runs inside of runs are parts of these."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    found = []
    for place, inside, _ in os.walk(folder):
        inside[:] = sorted((name for name in inside if not name.startswith(".") and name != "wandb"), key=_in_order)
        if is_run(Path(place)):
            inside.clear()
            found.append(Path(place))
    return found


def _in_order(name: str) -> tuple[int, str]:
    """Members of a sweep by their numbers."""
    number = name.partition("-")[0]
    return int(number) if number.isdecimal() and len(number) < 4 else 0, name


def _overview(members: Sequence[ComparedRun], experiments: int) -> str:
    summaries = [member.run.summary for member in members]
    seconds = [summary["seconds"] for summary in summaries if is_number(summary.get("seconds"))]
    ended = [summary for summary in summaries if summary.get("status") == "finished"]
    return (
        f"{counted(len(members), 'run')} in {counted(experiments, 'experiment')}; {len(ended)} trained to the end; "
        f"{sum(seconds) / 60:.0f} minutes of running time together."
    )


def _all_runs(members: Sequence[ComparedRun], numbers: Mapping[str, int]) -> Table:
    rows = []
    for member in members:
        summary, times = member.run.summary, _times(member) or [DASH]
        rows.append(
            [
                f"{numbers[member.name]}",
                member.name,
                member.loss or "SFT alone",
                format_value(member.seed),
                status(summary) or "unfinished",
                *(time[:19].replace("T", " ") for time in (times[0], times[-1])),
                f"{summary['seconds']:.0f}" if is_number(summary.get("seconds")) else DASH,
                _in_short(member),
            ]
        )
    header = ["run", "folder", "loss", "seed", "status", "first metric, UTC", "last metric, UTC", "seconds", "files"]
    note = "Members of a sweep that trained together count their common time each."
    return Table("All runs", header, rows, note if any(map(_is_together, members)) else "")


def _times(member: ComparedRun) -> list[str]:
    """When each row of metrics was written."""
    return [str(row["time"]) for row in member.run.metrics if "time" in row]


def _begun(member: ComparedRun) -> tuple[bool, str]:
    """For an order in time, with runs that say no time at the end."""
    times = _times(member)
    return not times, min(times, default="")


def _is_together(member: ComparedRun) -> bool:
    return as_count(dig(member.run.summary, "cohort", "size")) > 1


def _in_short(member: ComparedRun) -> str:
    """Whether the files of a run are as it left them."""
    try:
        states = sealed_files(member.run.folder)
    except UserError:
        return "nobody knows"
    if not states:
        return "no digests: the run did not end"
    wrong = [name for name, state in states.items() if state != UNCHANGED]
    return f"not as the run left them: {', '.join(wrong)}" if wrong else "as the run left them"


def _experiment(members: list[ComparedRun], numbers: Mapping[str, int]) -> _Experiment:
    name, runs = members[0].run.folder.parent.name, [_run(member, numbers[member.name]) for member in members]
    whole = [member for member, run in zip(members, runs, strict=True) if run.is_whole]
    if not whole:
        return _Experiment(name, "", ["No run has numbers that can be shown."], [], [], [], Questions([], ""), runs)
    found = compare(whole)
    return _Experiment(
        name,
        overview(found),
        headline(found),
        cautions(found),
        _figures(found, numbers),
        result_tables(found),
        questions(found),
        runs,
    )


def _figures(found: Comparison, numbers: Mapping[str, int]) -> list[_Figure]:
    """The curves of all runs, for each metric that any of them has."""
    drawn = []
    for stage, metric, title, axis, level in _CURVES:
        runs = {
            _label(f"{numbers[member.name]}: {found.titles[member.name]}"): member.run
            for member in found.members
            if any(series(member.run.metrics, stage, split, metric)[0] for split in ("train", "eval"))
        }
        if runs:
            figure = metric_curves(runs, metric, axis, level, stage)
            drawn.append(_Figure(title, as_address(figure)))
    return drawn


def _label(text: str) -> str:
    """A name that any font has the letters of; the tables have it as it is."""
    return " ".join(text.encode("ascii", "replace").decode().split())[:_LONGEST_LABEL]


def _run(member: ComparedRun, number: int) -> _Run:
    files, problems = _files(member.run.folder)
    problems = list(dict.fromkeys([*problems, *member.run.problems]))
    try:
        tables = _tables(member)
        alone = compare([member])
        headline(alone), cautions(alone), result_tables(alone), questions(alone)
    except Exception as error:  # files that others have written may hold anything
        why = f"Its numbers cannot be shown ({type(error).__name__}: {error}), so it is left out of the comparison."
        return _Run(number, member.name, False, [why, *problems], [files])
    return _Run(number, member.name, True, problems, [*tables, files])


def _tables(member: ComparedRun) -> list[Table]:
    """What a run was asked for, what it was made of, and what came out."""
    run, summary = member.run, member.run.summary
    found = [_from_recipe(member), Table("What ran", ["", ""], [list(row) for row in settings_and_data(run)])]
    for caption, (header, rows) in (
        ("Held-out evaluation", evaluation_table(summary, run.metrics)),
        ("Stages", stage_table(summary)),
    ):
        if rows:
            found.append(Table(caption, header, rows, is_numbers=True))
    return found


def _files(folder: Path) -> tuple[Table, list[str]]:
    """The files that reports are made from with their digests, and a sentence for each that is gone."""
    try:
        states = sealed_files(folder)
    except UserError:
        states = {}
    problems = [f"{name} is missing." for name, state in states.items() if not (folder / name).is_file()]
    rows = [
        [name, state, short_hash(file_digest(folder / name)) if (folder / name).is_file() else DASH]
        for name, state in states.items()
    ]
    if not (folder / SEAL).exists():
        problems.append(f"There is no {SEAL}, which a run writes at its end: nobody knows whether files have changed.")
    note = (
        f"By the digests that the run wrote into {SEAL} at its end. Whoever changes a file and its digest there is not "
        f"found out; values that contradict each other, or another run with this seed, would tell."
    )
    return Table("Files", ["file", "is", "digest now (BLAKE2b)"], rows, note), problems


# Settings that differ from the recipe


def _from_recipe(member: ComparedRun) -> Table:
    """What the run was told that its recipe does not say."""
    recipe, config = str(member.run.summary.get("recipe")), member.run.config
    asked = _asked(member.run.folder)
    try:
        own, chosen = _composed(recipe, None)
        rows: list[list[str]] = []
        if member.loss and member.loss != chosen:
            own, _ = _composed(recipe, member.loss)
            rows.append(["loss", member.loss, chosen])
        rows += [[key, _said(value), _said(other)] for key, value, other in _differences(config, own)]
        note = f"Settings that are not listed are those of recipe={recipe}, or the defaults of the loss."
        caption = "Settings that differ from the recipe"
    except UserError as error:
        rows = [[key, _said(value), DASH] for key, value in flat(config).items()]
        why = str(error).partition(";")[0].rstrip(".")
        note = f"These are all settings, because the recipe cannot be composed here: {why}."
        caption = "Settings"
    if not config:
        rows, note = [], "config.yaml cannot be read, so nobody knows the settings."
    elif not rows:
        rows = [["none", DASH, DASH]]
    if asked:
        note += f" The command: {' '.join(asked)}"
    return Table(caption, ["setting", "this run", "the recipe"], rows, note)


def _asked(folder: Path) -> list[str]:
    """The words of the command, as Hydra keeps them; empty where it kept none."""
    try:
        words = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    if not isinstance(words, list):
        return []
    split = (str(word).partition("=") for word in words)
    return [f"{key}{is_}{value}" for key, is_, value in split if redact({key: value}) == {key: value}]


@cache
def _composed(recipe: str, loss: str | None) -> tuple[dict[str, Any], str]:
    settings, chosen = recipe_settings(recipe, loss)
    return redact(settings), chosen


def _differences(ours: Any, theirs: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every setting with two values, by its dotted key; none that the run's version did not know."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in ours:
            if key or name not in _SAME_FOR_ALL:
                yield from _differences(ours[name], theirs.get(name), f"{key}.{name}" if key else str(name))
    elif ours != theirs:
        yield key, ours, theirs


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return "given" if value else "none"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list) else format_value(value)
