"""Objects in which a key stands twice: Python keeps the last value without a word."""

from __future__ import annotations

import json
from typing import Any


class KeyTwice(ValueError):
    """A key stands twice in one object."""


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no key stands twice.

    Raises:
        KeyTwice: a key does.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyTwice(f"the key '{next(name for name in found if names.count(name) > 1)}' stands twice")
    return found


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none; `KeyTwice` where an object has a key twice.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=without_twins)
