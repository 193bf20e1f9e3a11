"""The tools whose files have a translation, and which of them a file belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import UserError, require
from alignment.migration import axolotl, llama_factory, trl
from alignment.migration.draft import Circumstances, Draft, Table
from alignment.migration.keys import axolotl as axolotl_keys
from alignment.migration.keys import llama_factory as llama_factory_keys
from alignment.migration.keys import trl as trl_keys


@dataclass(frozen=True)
class Tool:
    """One tool: its name for people, its table of keys, its defaults, and the function that fills a draft."""

    title: str
    table: Table
    defaults: Mapping[str, Any]
    translate: Callable[[Draft, Path], str]


TOOLS = {
    "trl": Tool("TRL", trl_keys.TABLE, trl_keys.DEFAULTS, lambda draft, _: trl.translate(draft)),
    "llamafactory": Tool(
        "LLaMA-Factory", llama_factory_keys.TABLE, llama_factory_keys.DEFAULTS, llama_factory.translate
    ),
    "axolotl": Tool("Axolotl", axolotl_keys.TABLE, axolotl_keys.DEFAULTS, lambda draft, _: axolotl.translate(draft)),
}


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a file in YAML or JSON.

    Raises:
        UserError: it cannot be read, or is no mapping of keys to values.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{place} is not YAML.") from None
    fine = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    require(fine and bool(content), f"{path} is no training configuration: it must map keys to values.")
    return content


def recognised(given: Mapping[str, Any], path: Path) -> str:
    """The tool that a file belongs to, by the keys that only this tool has.

    Raises:
        UserError: there are none, or those of two tools.
    """
    marks = {}
    for name, tool in TOOLS.items():
        others = {key for other, it in TOOLS.items() if other != name for key in it.table}
        marks[name] = [key for key in given if key in tool.table and key not in others]
    found = [name for name in TOOLS if marks[name]]
    choice = f"--from {'|'.join(TOOLS)} says whose file it is"
    if len(found) > 1:
        told = " and ".join(f"{marks[name][0]} is a key of {TOOLS[name].title}" for name in found)
        raise UserError(f"{path} has keys of several tools ({told}): {choice}.")
    known = sorted((sum(key in tool.table for key in given) for tool in TOOLS.values()), reverse=True)
    require(
        bool(found) or known[0] > 0,
        f"{path} is no training configuration of {', '.join(t.title for t in TOOLS.values())}: none of its keys is "
        "known.",
    )
    require(bool(found), f"{path} has no key that only one of the tools has: {choice}.")
    return found[0]


def translate(given: Mapping[str, Any], path: Path, tool: Tool, around: Circumstances) -> tuple[Draft, str]:
    """The recipe of a file, as settings with their origins, and the method that it trains.

    Raises:
        UserError: it has no translation, and why.
    """
    draft = Draft(tool.title, given, tool.table, tool.defaults, around)
    try:
        method = tool.translate(draft, path)
        draft.finish()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return draft, method
