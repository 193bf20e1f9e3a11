"""The runs of a comparison, and the settings that tell them apart."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignment.comparison.settings import differing, names, settings_that_matter, side_by_side, told
from alignment.errors import UserError
from alignment.runs.folder import (
    RUN_FILES,
    RunFiles,
    dig,
    eval_pairs,
    holds_any,
    loss_name,
    read_rows,
    read_run,
    submapping,
)
from alignment.runs.text import format_value, is_number


@dataclass(slots=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        settings: those that matter, by dotted keys, without seeds. Without config.yaml: the settings of the loss alone.
        pairs: the values of each held-out pair after training; empty if the run did not keep them.
    """

    name: str
    run: RunFiles
    settings: dict[str, Any] = field(default_factory=dict)
    seed: Any = None
    loss: str = ""
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_stopped(self) -> bool:
        """Whether early stopping ended it. Its results are then no match for those of runs that reached their end."""
        return self.run.summary.get("status") == "stopped"


@dataclass(slots=True)
class Variant:
    """Runs with the same settings but for the seed.

    Attributes:
        settings: those that differ between the variants of this loss.
        label: the loss with as many of them as tell it from other variants.
        members: the runs that trained to their end.
        stopped: the runs that early stopping ended.
    """

    loss: str
    settings: dict[str, Any]
    members: list[ComparedRun]
    stopped: list[ComparedRun] = field(default_factory=list)
    label: str = ""

    @property
    def begun(self) -> list[ComparedRun]:
        """All its runs: those that trained to the end, then those that were stopped."""
        return [*self.members, *self.stopped]

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the runs that trained to the end."""
        return [member.seed for member in self.members]


def rows_by_key(rows: Iterable[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Rows by the value of a key. Repeated values are numbered, so that each row has a name of its own."""
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        name = str(row.get(key))
        found[f"{name} #{seen[name]}"] = row
        seen[name] += 1
    return found


def _read_pairs(run: RunFiles) -> dict[str, dict[str, Any]]:
    name = "held_out.jsonl"
    is_expected = submapping(run.summary, "stages", "preference") and eval_pairs(run.summary)
    if not is_expected and not (run.folder / name).exists():
        return {}
    return rows_by_key([row for row in read_rows(run, name) if row.get("moment") == "final"], "key")


def without_copies(members: Sequence[ComparedRun]) -> tuple[list[ComparedRun], dict[str, str]]:
    """The runs without copies of others, and the name of each copy with the name of its original.

    A copied folder, or a run that was repeated with the same seed, ends with the very same policy: it counts once.
    """
    kept: dict[tuple[Any, ...], ComparedRun] = {}
    copies = {}
    for member in members:
        identity = dig(member.run.summary, "model", "final_identity")
        key = (identity, member.loss, member.seed, json.dumps(member.settings, sort_keys=True, default=str))
        first = kept.setdefault(key, member) if identity else member
        if first is not member:
            copies[member.name] = first.name
    return [member for member in members if member.name not in copies], copies


def read_member(folder: Path, name: str) -> ComparedRun:
    """Read a run folder. Whatever is missing or cannot be read, even the whole folder, is named in `run.problems`."""
    failed = folder / "failed.json"
    try:
        run = read_run(folder)
    except UserError as error:
        run = RunFiles(folder, problems=[] if os.path.isfile(failed) else [str(error)])
    if run.summary and run.summary.get("status") not in ("finished", "stopped"):
        run.problems.append(f"it is not finished: its status is {format_value(run.summary.get('status'))}.")
    if os.path.exists(failed):
        try:
            reason = json.loads(failed.read_text("utf-8"))["error"]
            run.problems.append(f"it failed: {' '.join(str(reason).split())}")
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            run.problems.append("it failed, and failed.json cannot be read.")
    # Without its configuration, a run still has the loss in its summary: enough to join the other seeds.
    known = submapping(run.summary, "stages", "preference", "settings")
    settings = settings_that_matter(run.config or (known and {"loss": known}))
    seed = run.summary.get("seed", run.config.get("seed"))
    return ComparedRun(name, run, settings, seed, _loss(run), _read_pairs(run))


def _loss(run: RunFiles) -> str:
    """The name of the preference loss; empty for a run without a preference stage."""
    if dig(run.summary, "stages", "preference"):
        return loss_name(run.summary)
    if not run.config.get("loss"):
        return ""
    try:  # a run that did not end: the loss that it was started with
        asked = yaml.safe_load((run.folder / ".hydra" / "hydra.yaml").read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        asked = None
    return str(dig(asked, "hydra", "runtime", "choices", "loss") or "unknown loss")


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The given run folders, and the run folders directly inside the others, in the order of their numbers.

    Raises:
        UserError: one of the folders neither is nor holds a run folder, or cannot be opened.
    """
    found: list[Path] = []
    for folder in folders:
        inside = [folder]
        if not is_run(folder):
            inside = sorted((path for path in _folders(folder) if _may_be_run(path)), key=_number)
        if not inside:
            raise UserError(
                f"{folder} is no run folder and holds none: neither it nor a folder in it has any of "
                f"{', '.join(RUN_FILES)}."
            )
        found += inside
    return list(dict.fromkeys(path.resolve() for path in found))


def is_run(folder: Path) -> bool:
    """Whether the folder holds a file of a run, or failed.json, which says why there is none.

    Raises:
        UserError: the folder cannot be opened.
    """
    return holds_any(folder, (*RUN_FILES, "failed.json"))


def _may_be_run(folder: Path) -> bool:
    try:
        return is_run(folder)
    except UserError:
        return True  # so that the comparison names it


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be opened: {error.strerror}.") from None


def _number(folder: Path) -> tuple[bool, int, str]:
    number = folder.name.split("-")[0]
    return (not number.isdecimal(), int(number) if number.isdecimal() else 0, folder.name)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The paths of the folders below their common folder."""
    base = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(base)) for folder in folders]


def make_comparable(members: Sequence[ComparedRun]) -> None:
    """Give the runs with a preference stage settings that can be laid side by side, whichever version they are of."""
    trained = [member for member in members if member.loss]
    settings = side_by_side([(member.loss, member.settings) for member in trained])
    for member, several in zip(trained, settings, strict=True):
        member.settings = several


def differing_settings(members: Sequence[ComparedRun]) -> list[str]:
    """The settings with more than one value. Settings of a loss count among the runs with that loss only."""
    keys = {key for key in differing([member.settings for member in members]) if not key.startswith("loss.")}
    for loss in {member.loss for member in members}:
        own = differing([member.settings for member in members if member.loss == loss])
        keys |= {key for key in own if key.startswith("loss.")}
    return [key for key in dict.fromkeys(key for member in members for key in member.settings) if key in keys]


def variants(members: Sequence[ComparedRun]) -> list[Variant]:
    """The runs with a preference stage, grouped by loss and differing settings, in the order of losses and settings."""
    trained = [member for member in members if member.loss]
    # A setting that is the same in all runs of a loss belongs to the loss, and no name repeats it.
    keys = {loss: differing([m.settings for m in trained if m.loss == loss]) for loss in {m.loss for m in trained}}
    found: dict[tuple[Any, ...], Variant] = {}
    for member in trained:
        settings = {key: member.settings[key] for key in keys[member.loss] if key in member.settings}
        values = tuple((key, told(value)) for key, value in settings.items())
        variant = found.setdefault((member.loss, values), Variant(member.loss, settings, []))
        (variant.stopped if member.is_stopped else variant.members).append(member)
    order = list(dict.fromkeys(variant.loss for variant in found.values()))

    def place(variant: Variant) -> tuple[Any, ...]:
        values = (variant.settings.get(key) for key in keys[variant.loss])
        return (order.index(variant.loss), *((0, v, "") if is_number(v) else (1, 0, str(v)) for v in values))

    several = sorted(found.values(), key=place)
    for variant, name in zip(several, names([(v.loss, v.settings) for v in several]), strict=True):
        variant.label = name
    return several
