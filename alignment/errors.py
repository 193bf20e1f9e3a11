"""The one exception that means "you can fix this", the checks that raise it, and how command lines end with it."""

from __future__ import annotations

import argparse
import errno
import math
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NoReturn

_PASSWORD = re.compile(r"(://[^/@\s:]*:)[^/@\s]+(?=@)")


def has_password(text: str) -> bool:
    """Whether an address in the text has a password in it, as in https://user:password@host."""
    return _PASSWORD.search(text) is not None


def without_passwords(text: str) -> str:
    """The text with *** in place of passwords in addresses."""
    return _PASSWORD.sub(r"\1***", text) if "://" in text else text


class UserError(ValueError):
    """A problem that the user can fix: a wrong key, a broken file, a missing package.

    The message is one full sentence that names the place (file, row, key) and what is accepted. The command line
    prints it without a traceback and exits with status 1. Any other exception that reaches the command line is a bug
    and keeps its traceback. Passwords in addresses are masked.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(without_passwords(str(message)))


class NotFinite(UserError):
    """A training met a number that is not finite. The same settings would meet it again, so the run cannot go on."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def positive(key: str, value: float) -> None:
    """Refuse a value that is not a finite number above 0."""
    require(0 < value < math.inf, f"{key} must be a finite number above 0, not {value}.")


def not_negative(key: str, value: float) -> None:
    """Refuse a value that is not a finite number of at least 0."""
    require(0 <= value < math.inf, f"{key} must be a finite number, at least 0, not {value}.")


def within(key: str, value: float, interval: str) -> None:
    """Refuse a value outside an interval like "[0, 0.5)": a square bracket includes its end, a round one does not."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low <= value <= high and (value != low or interval[0] == "[") and (value != high or interval[-1] == "]")
    require(inside, f"{key} must be in {interval}, not {value}.")


def as_names(key: str, value: Any) -> list[str]:
    """A list of names, each once; a single one may stand without a list. Anything else is refused."""
    found = value if isinstance(value, list) else [value]
    are_names = all(isinstance(name, str | int) and not isinstance(name, bool) and name != "" for name in found)
    require(are_names, f"{key} must be a name or a list of names like [a,b], not {value}.")
    return list(dict.fromkeys(map(str, found)))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The text " (did you mean ...?)" with the known word that is most similar, in any case; empty if none is."""
    plain = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), plain, 1)
    return f" (did you mean {plain[found[0]]}?)" if found else ""


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO)
_NAME_ERRORS = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_DISK_WORDS = (
    *("No space left on device", "Disk quota exceeded", "Read-only file system", "Permission denied"),
    *("inline_container.cc", "iostream"),
)


def disk_problem(error: BaseException) -> str | None:
    """A sentence, without its end, for an error of the file system that you can mend; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in _NAME_ERRORS:
            return f"{place}{error.strerror}; name another file or folder"
        return f"{place}{error.strerror}; free the disk or mend the rights" if error.errno in _DISK_ERRORS else None
    # Copies of folders gather their errors as text, and writers that are not Python's know no errno. Torch's gives
    # no reason either: it checks in inline_container.cc what it has written, and its streams fail by themselves.
    if any(words in str(error) for words in _DISK_WORDS):
        return "A file could not be written; free the disk or mend the rights"
    return None


@contextmanager
def ending_plainly() -> Iterator[None]:
    """Ends the process as a command ends: with one sentence and status 1 where you can mend something.

    After Ctrl-C the status is 130. Any other exception is a bug, and keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("\nInterrupted.\n")
        sys.exit(130)
    except Exception as error:
        if (problem := disk_problem(error)) is None:
            raise
        sys.exit(f"Error: {problem}.")


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`, with the word that you may have meant."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as one sentence.

        Raises:
            UserError: always.
        """
        hint = ""
        if option := re.search(r"unrecognized arguments: (--[^ =]+)", message):
            hint = did_you_mean(option[1], self._options())
        elif choice := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            hint = did_you_mean(choice[1], re.findall(r"'([^']+)'", choice[2]))
        raise UserError(f"{message[0].upper()}{message[1:]}{hint}; see {self.prog} --help.")

    def _options(self) -> set[str]:
        """All options, those of subcommands too."""
        found = set(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {name for parser in action.choices.values() for name in parser._option_string_actions}
        return found
