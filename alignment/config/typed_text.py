"""Settings as they are typed: text stays text where Hydra's grammar would read something else into it, or refuse it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from alignment.config.data import ONE_OR_MORE
from alignment.config.schema import RunConfig
from alignment.errors import UserError

_KEY = re.compile(r"\+{0,2}[\w@./$-]+")
_STRUCTURE = re.compile(r"[\[\]{},:]|[^\[\]{},:]+")
"""What stands in a list or a mapping: its signs, and everything between them."""


def quoted(text: str) -> str:
    """The text in quotes of Hydra's grammar, which gives back every character as it is.

    `${...}` in it still names another setting.
    """
    doubled = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), text)
    return f"'{doubled}'"


def quoted_path(path: Path) -> str:
    """A path in quotes, in which nothing names another setting."""
    return quoted(re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", str(path)))


def typed(key: str, value: str) -> str:
    """`key=value`, the value as Hydra's grammar takes it, as one word for a shell."""
    word = f"{key}={value}"
    return f'"{word}"' if not re.search(r'["$`!]|\\\\', word) else shlex.quote(word)


def typed_path(key: str, path: Path) -> str:
    """`key=path` as you type it."""
    plain = f"{key}={path}"
    if "${" in plain or str(path)[:1] in ("'", '"'):
        return typed(key, quoted_path(path))
    return shlex.quote(plain)


def as_text(settings: Sequence[str], *, sweeps: bool) -> list[str]:
    """Settings in which text is quoted wherever Hydra's grammar would not read it as it is typed.

    That is text that looks like a number or a truth value, and text with signs of the grammar, such as `~/x.jsonl`,
    `it's`, `a=b`, `run#1` or `größe`. A text of a single run may have commas. One text becomes a list where the setting
    takes a list of texts.

    Args:
        settings: from the command line, each `key=value`.
        sweeps: whether commas may separate the members of a sweep.

    Raises:
        UserError: it is not plain whether text or something else is meant; the sentence shows what to type.
    """
    return [_as_text(setting, sweeps) for setting in settings]


def _as_text(setting: str, sweeps: bool) -> str:
    key, equals, value = setting.partition("=")
    if not equals or not _KEY.fullmatch(key):
        return setting
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key} holds bytes that are not UTF-8: {value!a}.") from None
    if (
        _kind(key.lstrip("+")) == list[str] and value and not re.search(r"^\[|,|^null$|\$\{", value)
    ):  # one word of a list
        return f"{key}=[{value if _is_quoted(_read(setting)) else quoted(value)}]"
    of_text = is_text(key.lstrip("+")) and not (value.startswith("[") and _kind(key.lstrip("+")) is not str)
    read = _read(setting)
    if sweeps and of_text and not key.startswith("hydra.") and "," in value and not _is_quoted(read):
        return f"{key}={_members(key, value, read)}"
    if read is None:
        return f"{key}={_refused(key, value, of_text)}"
    if not of_text or _is_kept(read, value):
        return setting
    return f"{key}={quoted(value)}"


def is_text(key: str) -> bool:
    """Whether a setting takes text: `str`, perhaps null, also as a value of a mapping; or several texts in a list."""
    return _kind(key) in (str, ONE_OR_MORE)


def _kind(key: str) -> Any:
    """The type of a setting; None if there is none of this name."""
    kind: Any = HydraConf if key.startswith("hydra.") else RunConfig
    for name in key.removeprefix("hydra.").split("."):
        kind = _without_none(kind)
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        field = next((field for field in fields(kind) if field.name == name), None) if is_dataclass(kind) else None
        if field is None:
            return None
        kind = field.metadata.get("kind") or get_type_hints(kind)[name]
    return _without_none(kind)


def _without_none(kind: Any) -> Any:
    parts = [part for part in get_args(kind) if part is not NoneType]
    return parts[0] if len(parts) == 1 and get_origin(kind) is not dict and get_origin(kind) is not list else kind


def _read(setting: str) -> Override | None:
    """The setting as Hydra's grammar reads it; None if it does not."""
    try:
        [override] = OverridesParser.create().parse_overrides([setting])
    except HydraException:
        return None
    return override


def _is_quoted(read: Override | None) -> bool:
    return read is not None and isinstance(read._value, QuotedString)


def _is_kept(read: Override, value: str) -> bool:
    """Whether the grammar's reading of text is what was typed, or was asked for: null, quotes, a function."""
    found = read._value
    if found is None or isinstance(found, QuotedString) or "${" in value:
        return True
    if read.is_sweep_override():
        return re.fullmatch(r"[a-z]+\(.*\)", value, re.DOTALL) is not None
    return isinstance(found, str)


def _members(key: str, value: str, read: Override | None) -> str:
    """The values of the members of a sweep, each as text.

    Raises:
        UserError: the commas may be those of one text.
    """
    if read is not None and _is_kept(read, value):
        return value
    parts = _split_at_commas(value)
    if any(part != part.strip() or " " in part.strip() for part in parts if part[:1] not in ("'", '"')) or (
        Path(value).expanduser().exists()
    ):
        sweep = ",".join(part.strip() if part.strip()[:1] in ("'", '"') else quoted(part.strip()) for part in parts)
        raise UserError(
            f"{key} may be one text or several, since its commas separate the members of a sweep: for one text type "
            f"{typed(key, quoted(value))}, for {len(parts)} members {typed(key, sweep)}."
        )
    return ",".join(_as_text(f"{key}={part}", sweeps=False).partition("=")[2] for part in parts)


def _split_at_commas(value: str) -> list[str]:
    """The parts of a text between commas; a part that begins with a quote reaches to the next one."""
    return re.findall(r"(?:\A|,)((?:\s*'(?:\\.|[^'\\])*'|\s*\"(?:\\.|[^\"\\])*\")?[^,]*)", value, re.DOTALL)


def _refused(key: str, value: str, of_text: bool) -> str:
    """Quotes around a value that the grammar does not read.

    Raises:
        UserError: it begins like something else than text.
    """
    if value[:1] in ("'", '"'):
        inner = value[1:-1] if len(value) > 1 and value[-1] == value[0] else value
        raise UserError(
            f"{key}={value} cannot be read, since a quote in it ends the text too early: type "
            f"{typed(key, quoted(inner))}."
        )
    if value[:1] in ("[", "{") and not of_text:
        parts = _STRUCTURE.findall(value)
        better = "".join(_quoted_part(part) for part in parts)
        example = better if _read(f"{key}={better}") is not None else "['first text','second text']"
        raise UserError(
            f"{key}={value} cannot be read: inside brackets, text with other signs than letters, digits and /-_.+ "
            f"stands in quotes, as in {typed(key, example)}."
        )
    return quoted(value)


def _quoted_part(part: str) -> str:
    text = part.strip()
    return (
        part if not text or text in "[]{},:" or _read(f"key={text}") is not None else part.replace(text, quoted(text))
    )
