"""`python -m alignment.report FOLDER...`: rewrites the report of a run, compares several runs, or hands them in."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.comparison import is_run, write_comparison
from alignment.course.hand_in import write_hand_in
from alignment.errors import CommandParser, ending_plainly
from alignment.runs.report import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the report of one run folder, compare several runs or a sweep, or put runs on one page to hand in."""
    parser = CommandParser(
        prog="python -m alignment.report",
        description="Give one run folder to rewrite its report.md. Give several, or the folder of a sweep, to compare "
        "the runs: comparison.html, .md and .csv are written beside them. --hand-in writes all runs in and below the "
        "folders to one page for somebody who grades them.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a run folder, or the folder of a sweep"
    )
    parser.add_argument("--hand-in", type=Path, metavar="FILE.html", help="one page of all runs, with digests")
    with ending_plainly():
        options = parser.parse_args(arguments)
        folders: list[Path] = options.folders
        if options.hand_in is not None:
            path = write_hand_in(folders, options.hand_in)
        elif len(folders) > 1:
            beside = Path(os.path.commonpath([os.path.dirname(os.path.realpath(folder)) for folder in folders]))
            path = write_comparison(folders, beside)
        elif is_run(folders[0]):
            path = write_report(folders[0])
        else:
            path = write_comparison(folders, folders[0])
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
