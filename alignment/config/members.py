"""The members of a sweep: the settings of each, from the command line and from the `sweep:` block of a recipe."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from alignment.config.overrides import parse_overrides
from alignment.config.renamed import refuse_renamed
from alignment.config.typed_text import is_text, quoted
from alignment.errors import UserError

_SWEEPS = "schema/sweep"
"""Where Hydra's store keeps the `sweep:` blocks of recipes, which no run reads."""


def store_sweep(name: str, sweep: Any, path: Path) -> None:
    """Keep the `sweep:` block of a recipe.

    Raises:
        UserError: a block that does not map settings to values.
    """
    entries = _sweep_entries(sweep, path)
    refuse_renamed((setting.partition("=")[0] for entry in entries for setting in entry), str(path))
    ConfigStore.instance().store(group=_SWEEPS, name=name.replace("/", "."), node={"members": entries})


def _sweep_entries(sweep: Any, path: Path) -> list[list[str]]:
    """The overrides of each entry of a recipe's `sweep:` block, followed by those that all entries share.

    Raises:
        UserError: a block that does not map settings to values.
    """
    common = OmegaConf.to_container(sweep) if isinstance(sweep, DictConfig) else None
    members = common.pop("members", [{}]) if isinstance(common, dict) else None
    if not isinstance(members, list) or not members or not all(isinstance(member, dict) for member in members):
        raise UserError(f"{path}: `sweep` must map settings to values, and `members` in it be a list of such mappings.")
    assert isinstance(common, dict)
    entries = []
    for member in members:
        settings = {**member, **common}
        for key, value in settings.items():
            if value == [] or isinstance(value, dict):
                raise UserError(f"{path}: sweep: {key} must be a value or a list of values, one for each member.")
        entries.append([f"{key}={_as_typed(value, is_text(key))}" for key, value in settings.items()])
    return entries


def _as_typed(value: Any, of_text: bool) -> str:
    """A YAML value as you would type it after a key on the command line; text has no commas between members."""
    if isinstance(value, list):
        return ",".join(_as_typed(item, of_text) for item in value)
    if isinstance(value, str):
        return quoted(value) if of_text else value
    return json.dumps(value)


def is_sweep(recipe: str) -> bool:
    """Whether the recipe has members of its own."""
    return ConfigStore.instance().get_type(_sweep_file(recipe)) is ObjectType.CONFIG


def _sweep_file(recipe: str) -> str:
    return f"{_SWEEPS}/{recipe.replace('/', '.')}.yaml"


def sweep_members(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every member of a sweep, its folder among them; the same for the same overrides.

    A recipe's own members come in the order of its `sweep:` block; settings of the command line replace theirs. Empty
    for an optimising sweeper and for a range of values: these are known only while the sweep runs.

    Raises:
        UserError: text that is no setting, or a setting that names the folders of members.
    """
    parsed = parse_overrides(overrides)
    given = {override.key_or_group for override in parsed}
    if "hydra.sweep.subdir" in given:
        raise UserError("hydra.sweep.subdir cannot be chosen: a sweep names its members' folders, to find them again.")
    searched = any(o.key_or_group == "hydra/sweeper" and o.value() != "basic" for o in parsed)
    if searched or any(o.is_sweep_override() and not o.is_discrete_sweep() for o in parsed):
        return []
    # The last value of a setting counts: several values before it would only repeat members.
    last = {override.key_or_group: override for override in parsed}
    parsed = [o for o in parsed if not o.is_sweep_override() or last[o.key_or_group] is o]
    members: list[list[str]] = []
    for member in _combinations(parsed):
        chosen = [str(o.value()) for o in parse_overrides(member) if o.key_or_group == "recipe"]
        recipe = chosen[-1] if chosen else ""
        entries = ConfigStore.instance().load(_sweep_file(recipe)).node.members if is_sweep(recipe) else [[]]
        for entry in entries:
            own = [override for override in parse_overrides(entry) if override.key_or_group not in given]
            for combination in _combinations(own):
                name = f"{len(members)}-{Path(recipe).name or 'run'}"
                members.append([*member, *combination, f"hydra.sweep.subdir={quoted(name)}"])
    return members


def single_values(overrides: Sequence[str]) -> list[str]:
    """The overrides that are the same for every member of a sweep."""
    return [override.input_line or "" for override in parse_overrides(overrides) if not override.is_sweep_override()]


def _combinations(parsed: Sequence[Override]) -> Iterator[list[str]]:
    choices = []
    for override in parsed:
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    yield from map(list, itertools.product(*choices))


def split_arguments(overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
    """What Hydra's grid sweeper launches: all members as one batch, since launchers have their own limits."""
    del max_batch_size
    return [sweep_members([override.input_line or "" for override in overrides])]
