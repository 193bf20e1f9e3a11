"""The report of one run, from the files in its folder alone; `python -m alignment.report FOLDER...` rewrites it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.comparison import is_run, write_comparison
from alignment.errors import UserError
from alignment.runs.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the report of a run folder, or compare several or those of a sweep; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m alignment.report",
        description="Rewrite the report of one run; of several runs, or of a sweep, write a comparison beside them.",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folder of a run or of a sweep")
    folders: list[Path] = parser.parse_args(arguments).folders
    try:
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
