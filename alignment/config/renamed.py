"""Settings that have changed: a new name, which the sentence that refuses the old one gives, another default, or none
at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from alignment.errors import UserError

RENAMED = {"reference.stages": "reference.parts"}
"""Old name of a setting -> its name now. Add a line when you rename a key of the schema."""

RETIRED = ("trainer.joint_passes",)
"""Settings that are gone. None of them touched a result, so a run that had one is read and goes on without it."""

FORMER_DEFAULTS = {"model.attention": "sdpa", "adapter.target_modules": "[all-linear]"}
"""Setting whose default is `auto` now -> what it was: a run that began with it goes on with it."""


def refuse_renamed(keys: Iterable[str], place: str = "") -> None:
    """Refuse settings under a name of before.

    Args:
        keys: names of settings, with dots.
        place: the file or folder that holds them, for the sentence; empty for the command line.

    Raises:
        UserError: the first such key, and its name now.
    """
    for key in keys:
        if (new := name_now(key)) != key:
            raise UserError(f"{place}{': ' if place else ''}{key} is now called {new}.")


def name_now(key: str) -> str:
    """The name that a setting of the run, or of its SFT stage, has now."""
    name = key.removeprefix("sft.")  # the SFT stage has sections of the same types as the run
    return key.removesuffix(name) + RENAMED.get(name, name)


def is_retired(key: str) -> bool:
    """Whether a setting, of the run or of its SFT stage, is one of `RETIRED`."""
    return key.removeprefix("sft.") in RETIRED


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, its keys joined by dots."""
    if isinstance(value, Mapping) and value:
        items = [flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {key: v for item in items for key, v in item.items()}
    return {prefix: value}
