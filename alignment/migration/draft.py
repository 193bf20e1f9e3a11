"""A recipe in the making: what a file gives, what becomes of each of its keys, and what is to be said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignment.errors import as_names, require

NOTHING: tuple[Any, ...] = (None, False, "", 0, [], {}, "no", "none", "auto")
"""Values with which most switches of other tools do nothing."""


@dataclass(frozen=True)
class Moves:
    """A key that means the same as one setting here. `kind` is number, whole, flag or text."""

    setting: str
    kind: str = "number"


@dataclass(frozen=True)
class Says:
    """A key without a setting here, and why. With a value in `unless` it asks for nothing that is missing here."""

    why: str
    unless: tuple[Any, ...] = NOTHING


Table = Mapping[str, Moves | Says | None]
"""What becomes of each key of a tool; None: the tool's own function reads it together with others."""


def says(why: str, keys: str, unless: tuple[Any, ...] = NOTHING) -> dict[str, Moves | Says | None]:
    """A part of a table: keys, parted by spaces, with one reason."""
    return dict.fromkeys(keys.split(), Says(why, unless))


def read(keys: str) -> dict[str, Moves | Says | None]:
    """A part of a table: keys, parted by spaces, that the tool's function reads."""
    return dict.fromkeys(keys.split())


@dataclass(frozen=True)
class Circumstances:
    """What a file does not say of its run: the processes that shared each step, the training rows, the method."""

    devices: int = 1
    rows: int | None = None
    method: str | None = None


@dataclass
class Draft:
    """The keys of one file, and the recipe that is made of them.

    A key without a value, or null, has the tool's default. Every key that the file gives ends in exactly one place:
    `origins` names it at a setting, `notes` says what is different, `same` and `unknown` list the rest.

    Attributes:
        tool: its name in messages.
        given: the keys and values of the file.
        table: what becomes of each known key.
        defaults: the tool's values of the keys that a recipe here needs.
        around: what the file does not say.
        groups: chosen options, by group.
        settings: values by setting.
        origins: the keys that a setting, or the option of a group, comes from.
        notes: sentences, by key.
    """

    tool: str
    given: Mapping[str, Any]
    table: Table
    defaults: Mapping[str, Any]
    around: Circumstances = field(default_factory=Circumstances)
    groups: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    same: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)

    # What the file gives

    def value(self, key: str) -> Any:
        """The value of a key, or the tool's default."""
        self.seen.add(key)
        value = self.given.get(key)
        return self.defaults.get(key) if value is None else value

    def gives(self, key: str) -> bool:
        """Whether the file itself has a value for the key."""
        self.seen.add(key)
        return self.given.get(key) is not None

    def number(self, key: str) -> float:
        """A finite number; text like 5e-7, as YAML reads it, is one too."""
        value = self.value(key)
        try:
            found = math.nan if isinstance(value, bool | list | dict) else float(value)
        except (TypeError, ValueError):
            found = math.nan
        require(math.isfinite(found), f"{key} must be a number, not {value!r}.")
        return found

    def whole(self, key: str) -> int:
        """An integer."""
        found = self.number(key)
        require(found == int(found), f"{key} must be an integer, not {self.value(key)!r}.")
        return int(found)

    def flag(self, key: str) -> bool:
        """A truth value; a key without one is false."""
        value = self.value(key)
        value = (
            {"true": True, "false": False, "auto": True}.get(value.lower(), value) if isinstance(value, str) else value
        )
        require(value is None or isinstance(value, bool), f"{key} must be true or false, not {value!r}.")
        return bool(value)

    def text(self, key: str) -> str | None:
        """Text, or null."""
        value = self.value(key)
        require(value is None or isinstance(value, str | int | float), f"{key} must be a text, not {value!r}.")
        return None if value is None else str(value)

    def names(self, key: str) -> list[str]:
        """A list of names; text with commas is one, too."""
        value = self.value(key)
        if isinstance(value, str):
            value = [name.strip() for name in value.split(",") if name.strip()]
        return [] if value is None else as_names(key, value)

    def mappings(self, key: str) -> list[dict[str, Any]]:
        """A list of mappings."""
        value = self.value(key) or []
        fine = isinstance(value, list) and all(isinstance(item, dict) for item in value)
        require(fine, f"{key} must be a list of mappings, not {value!r}.")
        return list(value)

    # What becomes of it

    def put(self, setting: str, value: Any, *keys: str) -> None:
        """Give a setting its value, which comes from these keys."""
        self.settings[setting] = value
        self.origins[setting] = keys
        self.seen.update(keys)

    def choose(self, group: str, option: str, *keys: str) -> None:
        """Choose an option of a group, which comes from these keys."""
        self.groups[group] = option
        self.origins[group] = keys
        self.seen.update(keys)

    def note(self, key: str, sentence: str) -> None:
        """Say of a key what is different here. A key may have several sentences."""
        self.seen.add(key)
        before = self.notes.get(key)
        if before is None or sentence not in before:
            self.notes[key] = sentence if before is None else f"{before} {sentence}"

    def finish(self) -> None:
        """Move the keys of the table that mean one setting each, and account for all others."""
        for key, entry in self.table.items():
            if isinstance(entry, Moves) and (key in self.defaults or self.gives(key)):
                self.put(entry.setting, getattr(self, entry.kind)(key), key)
        placed = {key for keys in self.origins.values() for key in keys}
        for key, value in self.given.items():
            if key not in self.table:
                self.unknown.append(key)
                continue
            entry = self.table[key]
            if isinstance(entry, Says) and not any(
                value is v or (value == v and type(value) is type(v)) for v in entry.unless
            ):
                self.note(key, entry.why)
            if key not in placed and key not in self.notes:
                self.same.append(key)
