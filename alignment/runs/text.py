"""How reports write numbers and texts."""

from __future__ import annotations

import html
import math
import re
import sys
from collections.abc import Sequence
from typing import Any

DASH = "-"
"""What a report writes for a missing value."""

MAX_SAMPLES = 8
"""Number of samples that a report shows."""

_MAX_CHARACTERS = 700
"""Length of a sample in a report."""


def escape_markdown(text: str) -> str:
    """Make text of a model or a user safe in a Markdown line or table cell: no markup, HTML or line break."""
    text = text.encode("utf-8", "replace").decode()
    text = re.sub("\r\n|[\r\u2028\u2029]", "\n", html.escape(text.strip(), quote=False))
    # Control characters, and those that turn the direction of the text around them.
    text = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)
    # Character references, unlike backslashes, are never read as structure, whatever stands around them.
    # An underscore between letters or digits is plain text already, and names are easier to read with it.
    text = re.sub(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])", lambda match: f"&#{ord(match[0])};", text)
    return text.replace("\n", "<br>")


def is_number(value: Any) -> bool:
    """Whether the value is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def format_value(value: Any) -> str:
    """A number with 4 digits, a mapping in parentheses, a dash for a missing value, anything else as it is."""
    if value is None or value == "":
        return DASH
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return f"({', '.join(f'{key} {format_value(inner)}' for key, inner in value.items())})"
    return str(value)


def clip(value: Any) -> str:
    """The beginning of a model's text, as long as a report shows it."""
    text = str(value) if value is not None else DASH
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + " ..."


def percent(value: Any) -> str:
    """A share in percent; anything but a number as in `format_value`."""
    return f"{100 * value:.1f}%" if is_number(value) else format_value(value)


def points(value: float) -> str:
    """A share, or a difference of two, in percentage points."""
    return f"{100 * value:.1f}"


def short_hash(digest: Any) -> str:
    """The first 16 characters of a hash, enough to tell it from others; summary.json has it whole."""
    return str(digest)[:16]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Cells of `rows` are escaped here, so pass plain text; `header` is written as it is."""
    lines = [header, ["---"] * len(header), *[[escape_markdown(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
