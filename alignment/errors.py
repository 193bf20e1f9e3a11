"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(ValueError):
    """A condition that the user can mend: a wrong key, a broken file, a missing package.

    The message is one full sentence that names the place (file, row, key) and what is accepted. The command line
    prints it without a traceback and exits with status 1. Everything else that escapes is a bug and keeps its
    traceback.
    """


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)
