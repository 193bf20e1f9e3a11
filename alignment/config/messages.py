"""What goes wrong while a configuration is composed, as one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from alignment.config.schema import RunConfig
from alignment.errors import UserError, did_you_mean
from alignment.losses import Loss


def sentence(error: Exception) -> str:
    """An exception of Hydra, OmegaConf or YAML as one sentence that names the file, if a file is at fault."""
    place = re.match(r"In '([^']+)': ", str(error))
    cause: BaseException = error
    while isinstance(deeper := _deeper(cause), HydraException | OmegaConfBaseException | UserError):
        cause = deeper
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and is_dataclass(cause.object_type):
        message = unknown_key(str(cause.full_key or cause.key), cause.object_type)
    else:
        message = _shortened(str(cause))
    if place and place[1] != "config":
        message = f"{_file_of(place[1])}: {message}"
    return message + "."


def unknown_key(key: str, section: Any) -> str:
    """The key is none of the section, a dataclass."""
    prefix, dot, name = key.rpartition(".")
    accepted = [field.name for field in fields(section)]
    hint = did_you_mean(name, accepted)
    if not hint and section is RunConfig:
        deeper = {path.rpartition(".")[2]: path for path in sorted(_keys_of(section), key=len, reverse=True)}
        similar = get_close_matches(name, deeper, 1)
        hint = f" (did you mean {deeper[similar[0]]}?)" if similar else ""
    elif hint and dot:
        hint = hint.replace("did you mean ", f"did you mean {prefix}.")
    of = f" of loss {section.name}" if issubclass(section, Loss) else ""
    return f"There is no setting {key}{of}{hint}; accepted are {', '.join(accepted)}"


def _keys_of(section: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(section).items():
        yield prefix + name
        for part in (hint, *get_args(hint)):
            if is_dataclass(part):
                yield from _keys_of(part, f"{prefix}{name}.")


def _shortened(text: str) -> str:
    """A message of Hydra's in one line, with a hint where an option is misspelt."""
    text = re.sub(r"^In '[^']+': ", "", text).split("Config search path:")[0]
    text, _, options = text.partition("Available options in ")
    lines = [line.strip() for line in text.splitlines()]
    message = " ".join(line for line in lines if line and not line.startswith(("object_type=", "reference_type=")))
    message = _in_plain_words(re.sub(r"\.? full_key:", ", at key", message).rstrip("."))
    if options:
        # A name with an @ is a recipe's own settings of a loss, which only the recipe chooses.
        names = [name for name in options.split()[1:] if "@" not in name]
        wanted = re.search(r"'([^'/]+)/([^']+)'", message)
        if wanted and wanted[1] == "recipe":
            names = recipes()
        message += f"{did_you_mean(wanted[2], names) if wanted else ''}; available are {', '.join(names)}"
    if re.search(r"'hydra/(launcher|sweeper)/", message):
        message += "; others come with the extras sweep-joblib, sweep-slurm and sweep-optuna of this package"
    return message


_PLAIN = (
    (r"Value '(.*)' of type '\w+' could not be converted to Float, at key (\S+)", r"\2 takes a number, not '\1'"),
    (
        r"Value '(.*)' of type '\w+' could not be converted to Integer, at key (\S+)",
        r"\2 takes a whole number, not '\1'",
    ),
    (r"Value '(.*)' is not a valid bool.*, at key (\S+)", r"\2 takes true or false, not '\1'"),
    (r"Value '(.*)' of type '\w+' is no text, at key (\S+)", r"\2 takes a text: put '\1' in quotes if it is one"),
    (r"Invalid value '(.*)', expected one of \[(.*)\], at key (\S+)", r"\3 must be one of \2, not '\1'"),
    (
        r"Invalid value assigned: \w+ is not a ListConfig, list or tuple, at key (\S+)",
        r"\1 takes a list, such as [a,b]",
    ),
    (r"Cannot assign \w+ to Dict\[.*\], at key (\S+)", r"\1 takes values by name, such as {name: value}, not a text"),
    (
        r"Cannot merge DictConfig with ListConfig, at key (.+)",
        r"\1 takes values by name, such as {name: value}, not a list",
    ),
    (r"field '(\S+)' is not Optional, at key \S+", r"\1 must have a value, and null is none"),
    (r"Interpolation key '(.*)' not found, at key (\S+)", r"\2: ${\1} names no other setting; in a text type \\${\1}"),
    (r"\S+ \(DictConfig\) does not support deletion, at key (\S+)", r"\1 cannot be taken out: give it another value"),
    (
        r"Sweep parameters '(.*)' requires --multirun",
        r"\1 stands for several values, one for each member of a sweep: start it with -m, or put a text in quotes",
    ),
    (
        r"Ambiguous value for argument '([^=]*)=(.*)' 1\..*",
        r"\1=\2 may be several values: a decimal number has a point, a list stands in brackets (\1=[\2]), and -m "
        r"starts one run for each value",
    ),
)
"""Sentences of OmegaConf and Hydra that are about a value, and ours."""


def _in_plain_words(message: str) -> str:
    for theirs, ours in _PLAIN:
        if (found := re.fullmatch(theirs, message, re.DOTALL)) is not None:
            return found.expand(ours)
    return message


def _deeper(error: BaseException) -> BaseException | None:
    if getattr(error, "_initialized", False) and not isinstance(error.__cause__, UserError):
        return None  # OmegaConf's whole message; where a debugger or OC_CAUSE asks, it has a cause that says less
    return error.__cause__ or (error.__context__ if isinstance(error, HydraException) else None)


def recipes() -> list[str]:
    """The names of all recipes that are registered."""

    def below(folder: Any, prefix: str) -> Iterator[str]:
        for name, node in folder.items():
            if isinstance(node, dict):
                yield from below(node, f"{prefix}{name}/")
            else:
                yield prefix + name.removesuffix(".yaml")

    return sorted(below(ConfigStore.instance().repo.get("recipe", {}), ""), key=lambda name: ("/" in name, name))


def _file_of(name: str) -> str:
    """The file behind a name in Hydra's store, or the name where it is a file of `conf/`."""
    store = ConfigStore.instance()
    stored = store.get_type(f"{name}.yaml") is ObjectType.CONFIG
    return (store.load(f"{name}.yaml").provider if stored else None) or name
