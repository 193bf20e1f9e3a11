"""Names in place of paths: what a file is called may be told, where it lies on your machine is nobody's business."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PATH = re.compile(r"(?<![\w/:.<-])~?/(?:[\w.@+,%=-]+/)+[\w.@+,%=-]*")


def is_local(name: str) -> bool:
    """Whether a name of a model or of data is a path of this machine."""
    return name.startswith(("/", "~", "./", "../")) or Path(name).is_absolute()


def without_paths(text: str, *folders: Path) -> str:
    """The text with the last part of each absolute path in place of the path.

    Args:
        folders: these are found whatever their names hold, spaces too.
    """
    for folder in folders:
        text = text.replace(str(folder), folder.name)
    return _PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)


def values_without_paths(value: Any) -> Any:
    """A value of YAML or JSON with names in place of paths, at any depth. A text that is a path as a whole is one."""
    if isinstance(value, Mapping):
        return {key: values_without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [values_without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if is_local(value) and "\n" not in value:
        return value.rstrip("/").rpartition("/")[2]
    return without_paths(value)
