"""The text of a recipe: settings with the keys that they come from, and what is different, as comments."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import yaml

from alignment.migration.draft import Draft

WIDTH = 120
_ORDER = ("seed", "device", "model", "quantization", "adapter", "data", "loss", "optim", "trainer", "reference")


def remarks(draft: Draft) -> list[str]:
    """What a reader must know, a paragraph each: what is different, what is as it was, what is not known."""
    paragraphs = []
    if draft.notes:
        paragraphs.append("These mean something else here, or nothing:")
        together: dict[str, list[str]] = {}
        for key, sentence in draft.notes.items():
            together.setdefault(sentence, []).append(key)
        paragraphs += [f"- {', '.join(keys)}: {sentence}" for sentence, keys in together.items()]
    if draft.same:
        paragraphs.append(f"These ask for nothing that is not so here: {', '.join(draft.same)}.")
    if draft.unknown:
        paragraphs.append(
            f"These are no keys of {draft.tool} that are known here, and are left out: {', '.join(draft.unknown)}."
        )
    return paragraphs


def wrapped(paragraphs: list[str], before: str = "") -> list[str]:
    """Lines of at most `WIDTH` characters, each with `before` in front."""
    lines = []
    for paragraph in paragraphs:
        hanging = f"{before}  " if paragraph.startswith("- ") else before
        text = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]+", " ", paragraph)
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=before,
            subsequent_indent=hanging,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def recipe_text(draft: Draft, source: str, method: str) -> str:
    """The recipe as YAML.

    Args:
        draft: the settings.
        source: the name of the file that it was made from.
        method: that the file trains.
    """
    head = [f"Made by python -m alignment.migrate from {source}, a file of {draft.tool}: {method}.", *remarks(draft)]
    lines = ["# @package _global_", *wrapped(head, "# "), "defaults:"]
    lines += [f"  - override /{group}: {draft.groups[group]}{_origin(draft, group)}" for group in sorted(draft.groups)]
    nested: dict[str, Any] = {}
    for setting in draft.settings:
        node = nested
        *sections, name = setting.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = setting
    for section in sorted(nested, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
        lines += _block(draft, section, nested[section], "")
    return "\n".join(lines) + "\n"


def _block(draft: Draft, name: str, node: Any, indent: str) -> list[str]:
    """One section, or one setting with the keys that it comes from behind it."""
    if isinstance(node, dict):
        lines = [f"{indent}{name}:"]
        return lines + [line for key, inner in node.items() for line in _block(draft, key, inner, f"{indent}  ")]
    return [f"{indent}{name}: {_value(draft.settings[node])}{_origin(draft, node)}"]


def _origin(draft: Draft, setting: str) -> str:
    """The keys of the file that a setting or an option comes from, or the one whose default it is, as a comment."""
    keys = [key for key in draft.origins[setting] if key in draft.table]
    given = [key for key in keys if draft.given.get(key) is not None]
    if not keys:
        return ""
    return f"  # {', '.join(dict.fromkeys(given))}" if given else f"  # {keys[0]}, by default"


def _value(value: Any) -> str:
    """A value on one line. A dollar with a brace would name another setting of the recipe, so it is escaped."""
    text = yaml.safe_dump(
        _escaped(value), default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
