"""The runs that are compared, and what differs between them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

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

_SILENT = ("tracking", "resume")
"""Settings that change where a run reports to, and nothing of its result."""


@dataclass(slots=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        settings: its configuration by dotted keys, without seeds; those of the loss alone where the rest is lost.
        pairs: the held-out pairs' values after training by pair; empty where they were not kept.
    """

    name: str
    run: RunFiles
    settings: dict[str, Any] = field(default_factory=dict)
    seed: Any = None
    loss: str = ""
    pairs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_stopped(self) -> bool:
        """It was stopped early, so that nothing of it can be compared with what others reached at their end."""
        return self.run.summary.get("status") == "stopped"


@dataclass(slots=True)
class Variant:
    """The members that differ by their seed alone; those that were stopped early, apart from the others."""

    loss: str
    settings: dict[str, Any]
    members: list[ComparedRun]
    stopped: list[ComparedRun] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The loss with the settings that tell it from the others."""
        parts = [f"{key.removeprefix('loss.')} {format_value(value)}" for key, value in self.settings.items()]
        return ", ".join([self.loss.upper(), *parts])

    @property
    def begun(self) -> list[ComparedRun]:
        """Those that trained to the end, and those that were stopped."""
        return [*self.members, *self.stopped]

    @property
    def seeds(self) -> list[Any]:
        """Of its members."""
        return [member.seed for member in self.members]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, value


def rows_by_key(rows: Iterable[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """Rows by a key; the second of a key is another item than the first."""
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        name = str(row.get(key))
        found[f"{name} #{seen[name]}"] = row
        seen[name] += 1
    return found


def _read_pairs(run: RunFiles) -> dict[str, dict[str, Any]]:
    name = "held_out.jsonl"
    if not os.path.exists(run.folder / name):
        if submapping(run.summary, "stages", "preference") and eval_pairs(run.summary):
            run.problems.append(f"{name} is missing.")
        return {}
    rows = read_rows(run, name, lambda row: [value for key, value in row.items() if "/" in key])
    final = [row for row in rows if row.get("moment") == "final"]
    lacking = eval_pairs(run.summary) - len(final)
    if rows and lacking > 0:
        run.problems.append(
            f"{name} lacks {lacking} of {eval_pairs(run.summary)} pairs: differences are over the others."
        )
    return rows_by_key(final, "key")


def without_copies(members: Sequence[ComparedRun]) -> tuple[list[ComparedRun], dict[str, str]]:
    """The members without copies of others among them, and which of those left out is a copy of which.

    The same run, or one that did the same once more, ends with the very same policy: it is no second seed.
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
    """Read a run folder; what is missing or broken, if it is all of it, is named in `run.problems`."""
    failed = folder / "failed.json"
    try:
        run = read_run(folder)
    except UserError as error:
        run = RunFiles(folder, problems=[] if os.path.isfile(failed) else [str(error)])
    if run.summary and run.summary.get("status") not in ("finished", "stopped"):
        run.problems.append(f"it is not finished: its status is {format_value(run.summary.get('status'))}.")
    if os.path.exists(failed):
        try:
            run.problems.append(f"it failed: {_sentence(json.loads(failed.read_text('utf-8')))}")
        except (OSError, ValueError, RecursionError):
            run.problems.append("it failed, and failed.json cannot be read.")
    seed = run.summary.get("seed", run.config.get("seed"))
    # Without the configuration the summary still knows the loss, which is enough for a place beside the other seeds.
    known = submapping(run.summary, "stages", "preference", "settings")
    settings = {}
    for key, value in _flat(run.config or (known and {"loss": known})):
        if key.split(".")[0] not in _SILENT and key.split(".")[-1] != "seed":
            settings[key] = value if isinstance(value, Hashable) else json.dumps(value, default=str)
    seed = seed if isinstance(seed, int | str) else None
    return ComparedRun(name, run, settings, seed, _loss(run), _read_pairs(run))


def _loss(run: RunFiles) -> str:
    """The name of the preference loss; empty for a run without one."""
    if dig(run.summary, "stages", "preference"):
        return loss_name(run.summary)
    if not run.config.get("loss"):
        return ""
    try:  # a run that did not end: what was asked for
        asked = yaml.safe_load((run.folder / ".hydra" / "hydra.yaml").read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        asked = None
    return str(dig(asked, "hydra", "runtime", "choices", "loss") or "unknown loss")


def _sentence(value: Any) -> str:
    found = (
        next((text for _, text in _flat(value) if isinstance(text, str)), None) if isinstance(value, dict) else value
    )
    return " ".join(str(found).split()) or "no reason was kept."


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The run folders among and directly inside of the given ones, sweeps in the order of their members' numbers.

    Raises:
        UserError: one of them neither is nor holds a run folder, or cannot be looked into.
    """
    found: list[Path] = []
    for folder in folders:
        inside = [folder]
        if not is_run(folder):
            inside = sorted((path for path in _folders(folder) if _may_be_run(path)), key=_number)
        if not inside:
            raise UserError(f"{folder} is no run folder and holds none: in neither is any of {', '.join(RUN_FILES)}.")
        found += inside
    return list(dict.fromkeys(path.resolve() for path in found))


def is_run(folder: Path) -> bool:
    """It holds a file of a run, if only the one that says why it failed.

    Raises:
        UserError: it cannot be looked into.
    """
    return holds_any(folder, (*RUN_FILES, "failed.json"))


def _may_be_run(folder: Path) -> bool:
    try:
        return is_run(folder)
    except UserError:
        return True  # a member of which nothing can be read is named


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder} cannot be looked into: {error.strerror}.") from None


def _number(folder: Path) -> tuple[bool, int, str]:
    number = folder.name.split("-")[0]
    return (not number.isdecimal(), int(number) if number.isdecimal() else 0, folder.name)


def short_names(folders: Sequence[Path]) -> list[str]:
    """What tells the folders apart: their paths below the folder that they share."""
    base = os.path.commonpath([folder.parent for folder in folders])
    return [str(folder.relative_to(base)) for folder in folders]


def differing_settings(members: Sequence[ComparedRun]) -> list[str]:
    """Settings with more than one value; those of a loss, among the members with that loss."""
    keys = {key for loss in {member.loss for member in members} for key in _varying(members, loss)}
    return [key for key in dict.fromkeys(key for member in members for key in member.settings) if key in keys]


def _varying(members: Sequence[ComparedRun], loss: str) -> set[str]:
    """What tells members with this loss from others: their own settings where those vary, and all else that does."""
    whole = [member for member in members if member.run.config]
    own = [member for member in members if member.loss == loss and member.settings]
    return {
        key
        for key in {key for member in own for key in member.settings}
        if len({_comparable(m.settings.get(key)) for m in (own if key.startswith("loss.") else whole)}) > 1
    }


def _comparable(value: Any) -> Hashable:
    return (type(value).__name__ if isinstance(value, bool) else "", value)


def variants(members: Sequence[ComparedRun]) -> list[Variant]:
    """Members that trained a preference, by loss and differing settings, in the order of losses and of settings."""
    trained = [member for member in members if member.loss]
    keys = differing_settings(trained)
    found: dict[tuple[Any, ...], Variant] = {}
    # What is the same for all with a loss goes with the loss, and is not said in each name.
    varying = {loss: _varying([m for m in trained if m.loss == loss], loss) for loss in {m.loss for m in trained}}
    for member in trained:
        settings = {key: member.settings[key] for key in keys if key in member.settings.keys() & varying[member.loss]}
        variant = found.setdefault((member.loss, *settings.items()), Variant(member.loss, settings, []))
        (variant.stopped if member.is_stopped else variant.members).append(member)
    order = list(dict.fromkeys(variant.loss for variant in found.values()))

    def place(variant: Variant) -> tuple[Any, ...]:
        values = (variant.settings.get(key) for key in keys)
        return (order.index(variant.loss), *((0, v, "") if is_number(v) else (1, 0, str(v)) for v in values))

    return sorted(found.values(), key=place)
