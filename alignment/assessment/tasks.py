"""The tasks of an evaluation, and the files that it leaves."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignment.assessment.entrants import Entrants, entrants, opened
from alignment.assessment.exports import FORMS, exported
from alignment.assessment.harness import HARNESS, HarnessTask
from alignment.assessment.held_out import ImplicitRewards, Perplexity
from alignment.assessment.instructions import Instructions
from alignment.assessment.page import to_html
from alignment.assessment.question_file import read_questions
from alignment.assessment.task import Task
from alignment.assessment.win_rates import WinRates
from alignment.comparison.between import FOUND, PAIRS
from alignment.comparison.tables import Table
from alignment.errors import UserError, did_you_mean, require
from alignment.files import atomic_write_bytes, to_json, to_json_lines
from alignment.runs.folder import write_page
from alignment.runs.record import versions

log = logging.getLogger(__name__)

TASKS: dict[str, type[Task]] = {
    "win_rate": WinRates,
    "ifeval": Instructions,
    "implicit": ImplicitRewards,
    "perplexity": Perplexity,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked for.

    Attributes:
        folders: of runs, or of sweeps.
        tasks: their names.
        settings: overrides of the settings that the runs had.
        against, count: see `entrants`.
        questions: a file of prompts in place of the held-out ones.
        exports: forms in which answers are written for other programs.
        out: where the files go.
    """

    folders: Sequence[Path]
    tasks: Sequence[str]
    settings: Sequence[str]
    against: str | None
    count: int
    questions: Path | None
    exports: Sequence[str]
    out: Path

    def __post_init__(self) -> None:
        known = [*TASKS, f"{HARNESS}<task>"]
        for task in self.tasks:
            if task not in TASKS and not task.startswith(HARNESS):
                raise UserError(f"There is no task {task}{did_you_mean(task, TASKS)}; accepted are {', '.join(known)}.")
        for form in self.exports:
            if form not in FORMS:
                raise UserError(f"export={form}{did_you_mean(form, FORMS)}: accepted are {', '.join(FORMS)}.")
        if not self.tasks and not self.exports:
            raise UserError(f"tasks names no task; accepted are {', '.join(known)}.")


def assess(asked: Asked) -> tuple[Path, list[Table]]:
    """Evaluate the policies of finished runs, and write what was found; returns the page, and its tables.

    Raises:
        UserError: runs that cannot be evaluated, or a task that cannot be done for them.
    """
    _require_writable(asked.out)
    rows = None if asked.questions is None else read_questions(asked.questions)
    policies = opened(asked.folders, asked.settings, rows)
    field = entrants(policies, asked.against, asked.count, asked.settings)
    tasks = {name: _maker(name)(field) for name in asked.tasks}
    results = {name: task.run() for name, task in tasks.items()}

    # Files
    cautions = [caution for result in results.values() for caution in result.cautions]
    tables = [table for result in results.values() for table in result.tables]
    for caution in cautions:
        log.warning("%s", caution)
    found: dict[str, Any] = {
        "policies": field.names,
        "identities": {policy.name: policy.identity for policy in field.policies},
        "settings": list(asked.settings),
        "cautions": cautions,
        "versions": versions(),
        **{name: result.found for name, result in results.items()},
    }
    lines = {name: rows for result in results.values() for name, rows in result.lines.items()}
    files = {name: to_json_lines(rows) for name, rows in lines.items()}
    files |= {name: data for form in asked.exports for name, data in exported(form, field).items()}
    shown = next((result for result in results.values() if result.questions), None)
    page = to_html(
        f"Evaluation: {asked.out.resolve().name}",
        tables,
        cautions,
        () if shown is None else shown.questions,
        "" if shown is None else shown.note,
    )
    try:
        for name, data in {**files, FOUND: to_json(found, 2)}.items():
            atomic_write_bytes(asked.out / name, data)
        if PAIRS not in files:  # of an evaluation before
            (asked.out / PAIRS).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{asked.out} cannot be written: {error.strerror}.") from None
    write_page(asked.out / "evaluation.html", page)
    return asked.out / "evaluation.html", tables


def _require_writable(out: Path) -> None:
    """Refuse a folder that cannot be written before hours of work, not after them."""
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    require(there.is_dir(), f"out={out} cannot be written: {there} is a file.")
    require(os.access(there, os.W_OK), f"out={out} cannot be written: you have no right to write into {there}.")


def _maker(name: str) -> Callable[[Entrants], Task]:
    if name.startswith(HARNESS):
        return partial(HarnessTask, name.removeprefix(HARNESS))
    return TASKS[name]
