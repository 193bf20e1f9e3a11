"""How a command ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest


def refusal_of(main: Callable[..., Any], arguments: Sequence[str]) -> str:
    """The sentence with which a command refuses its arguments; Python prints it and ends with status 1."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code
