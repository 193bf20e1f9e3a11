"""`python -m alignment.report FOLDER...`: rewrites the report of a run, or compares several runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.comparison import is_run, write_comparison
from alignment.errors import CommandParser, UserError
from alignment.runs.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the report of one run folder, or compare several runs or a sweep; returns the exit status."""
    parser = CommandParser(
        prog="python -m alignment.report",
        description="Give one run folder to rewrite its report.md. Give several, or the folder of a sweep, to compare "
        "the runs: comparison.html, .md and .csv are written beside them.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a run folder, or the folder of a sweep"
    )
    try:
        folders: list[Path] = parser.parse_args(arguments).folders
        if len(folders) > 1:
            beside = Path(os.path.commonpath([os.path.dirname(os.path.realpath(folder)) for folder in folders]))
            path = write_comparison(folders, beside)
        elif is_run(folders[0]):
            path = write_report(folders[0])
        else:
            path = write_comparison(folders, folders[0])
    except UserError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
