"""Values of settings as they are written: OmegaConf would make a truth of every number, and a text of every truth."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from omegaconf import BooleanNode, EnumNode, StringNode
from omegaconf.errors import ValidationError

from alignment.errors import UserError

_WORDS = {
    **dict.fromkeys(("true", "yes", "on", "y"), True),
    **dict.fromkeys(("false", "no", "off", "n"), False),
}
"""What YAML 1.1 writes for a truth value, in any case."""


_PLAIN = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
"""A whole number that looks like what it is."""

_ODD = re.compile(r"[\s:\[,{-][-+]?(0[0-9_xb]|[0-9][0-9_]*:[0-9])")
"""The beginning of one that may not; most files have none and are not read twice."""


def take_values_as_written() -> None:
    """Refuse what OmegaConf would turn into another value on its way to a typed setting.

    `export.merge=2` would be true, and `system: 1e3` of a YAML file the text "1000.0". The value that was given is lost
    once it has been set, wherever it came from, so OmegaConf's own conversions are replaced.
    """
    nodes: Any = (BooleanNode, StringNode, EnumNode)
    boolean, text, enum = nodes
    usual_text, usual_member = text._validate_and_convert_impl, enum.validate_and_convert_to_enum
    if getattr(usual_text, "is_strict", False):  # this module was loaded anew
        return

    def as_text(self: Any, value: Any) -> Any:
        if isinstance(value, bool | float) and not self._is_interpolation():
            raise ValidationError("Value '$VALUE' of type '$VALUE_TYPE' is no text")
        return usual_text(self, value)

    def as_member(enum_type: type[Enum], value: Any) -> Any:
        return usual_member(enum_type, _word_of(enum_type, value))

    as_text.is_strict = True  # type: ignore[attr-defined]
    boolean._validate_and_convert_impl = _as_truth
    text._validate_and_convert_impl = as_text
    enum.validate_and_convert_to_enum = staticmethod(as_member)


def _as_truth(self: Any, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    raise ValidationError("Value '$VALUE' is not a valid bool (type $VALUE_TYPE)")


def _word_of(kind: type[Enum], value: Any) -> Any:
    """The word that YAML reads as a truth value, where an option has this name: off, on, no, yes."""
    if not isinstance(value, bool):
        return value
    return next((word for word, truth in _WORDS.items() if truth is value and word in kind.__members__), value)


def refuse_other_numbers(path: Path) -> None:
    """Refuse a YAML file with a number that YAML reads otherwise than it looks: 0012 is 10, 1:30 is 90, 0x1F is 31.

    Raises:
        UserError: the first one, and what to write.
    """
    text = path.read_text(encoding="utf-8")
    pending = [yaml.compose(text, Loader=yaml.SafeLoader)] if _ODD.search(text) else []
    while pending:
        node = pending.pop()
        if isinstance(node, yaml.ScalarNode):
            if node.tag == "tag:yaml.org,2002:int" and not _PLAIN.fullmatch(node.value):
                raise UserError(
                    f"{path}: line {node.start_mark.line + 1}: YAML reads {node.value} as the number "
                    f"{yaml.safe_load(node.value)}: write that, or '{node.value}' in quotes for a text."
                )
        elif isinstance(node, yaml.MappingNode):
            pending += [part for entry in reversed(node.value) for part in reversed(entry)]
        elif isinstance(node, yaml.SequenceNode):
            pending += reversed(node.value)
