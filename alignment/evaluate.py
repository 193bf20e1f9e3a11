"""`python -m alignment.evaluate RUN... [key=value ...]`: asks finished policies again and has their answers judged."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from alignment import spinning  # noqa: F401 - first, because what follows imports torch
from alignment.errors import CommandParser, UserError, did_you_mean, ending_plainly

if TYPE_CHECKING:
    from alignment.comparison.tables import Table

_SHORT = {"judge": "evaluation.judge", "humans": "evaluation.human_labels", "prompts": "evaluation.prompts"}
_OWN = ("tasks", "against", "answers", "questions", "export", "out")
_KEYS = (*_SHORT, *_OWN)


def _settings(words: Sequence[str]) -> tuple[list[Path], dict[str, str], list[str]]:
    """The folders, the command's own settings and those of the runs, among the words of the command line."""
    folders: list[Path] = []
    given: dict[str, str] = {}
    settings: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or "/" in key:
            folders.append(Path(word).expanduser())
        elif key in _SHORT:
            settings.append(f"{_SHORT[key]}={value}")
        elif key in _OWN:
            given[key] = value
        elif key.startswith("evaluation.") or key == "device":
            settings.append(word)
        else:
            raise UserError(
                f"There is no setting {key}{did_you_mean(key, _KEYS)}; accepted are {', '.join(_KEYS)}, device and "
                f"settings that begin with evaluation."
            )
    return folders, given, settings


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise UserError(f"answers must be an integer from 1 to 9999, not '{text}'.")
    return int(text)


def _names(text: str) -> list[str]:
    return [name for name in text.strip("[]").split(",") if name]


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m alignment.evaluate",
        description="Ask the policies of finished runs held-out prompts and have their answers judged. Answers and "
        "judgements that are known already are not asked for again. evaluation.json and evaluation.html are written "
        "into the folder of the run, or beside several.",
        epilog="against: start or sft, of each run; all: each other; the folder of a run or of a model, or a hub id. "
        "Without it a run meets the policy that its preference stage has begun with. "
        "Example: python -m alignment.evaluate outputs/quickstart/a outputs/quickstart/b judge=rules",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN | key=value",
        help=f"folders of finished runs, or of sweeps, and {', '.join(_KEYS)}, device or evaluation.<setting>",
    )
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="your own recipes, as for the runs")
    return parser


def run(arguments: Sequence[str] | None) -> tuple[Path, list[Table]]:
    """What the command does; returns the page, and its tables.

    Raises:
        UserError: arguments that cannot be followed, or runs that cannot be evaluated.
    """
    options = _parser().parse_intermixed_args(arguments)
    folders, given, settings = _settings(options.words)
    if not folders:
        raise UserError("Name at least one folder of a finished run; see python -m alignment.evaluate --help.")
    count = _count(given.get("answers", "1"))
    exports = _names(given.get("export", ""))
    tasks = _names(given.get("tasks", "" if exports else "win_rate"))

    # The libraries take seconds to load, and speak while they do: only once the words are understood
    from alignment.stages.quiet import quieten_libraries

    quieten_libraries()
    from alignment.assessment.tasks import Asked, assess
    from alignment.config.registry import register
    from alignment.config.typed_text import as_text

    register(options.config_dir)
    beside = Path(os.path.commonpath([os.path.dirname(os.path.realpath(folder)) for folder in folders]))
    out = Path(given["out"]).expanduser() if "out" in given else folders[0] if len(folders) == 1 else beside
    questions = Path(given["questions"]).expanduser() if "questions" in given else None
    typed, against = as_text(settings, sweeps=False), given.get("against")
    return assess(Asked(folders, tasks, typed, against, count, questions, exports, out))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; `ending_plainly` says how it ends."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ending_plainly():
        page, tables = run(arguments)
    for table in tables:
        _show(table)
    sys.stdout.write(f"{page}\n")


def _show(content: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(title=content.caption, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in content.header:
        drawn.add_column(Text(name))
    for row in content.rows:
        drawn.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 1000).print(drawn)


if __name__ == "__main__":
    main()
