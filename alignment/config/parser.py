"""The parser of the commands `plan` and `cache`: short help, and one sentence for a mistake."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from alignment.errors import UserError, did_you_mean


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
