"""Many runs side by side: reads run folders, groups them into variants, ranks these and tests their differences.

`write_comparison` writes the result as a page (comparison.html), as Markdown and as plain numbers (comparison.csv).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from alignment.comparison.between import read_between
from alignment.comparison.members import is_run, read_member, run_folders, short_names
from alignment.comparison.page import to_html, to_markdown
from alignment.comparison.ranking import compare
from alignment.comparison.tables import to_csv
from alignment.comparison.tracked import sweep_summary
from alignment.errors import UserError
from alignment.runs.folder import write_page
from alignment.runs.sweep_tracking import send_summary

__all__ = ["is_run", "write_comparison"]

logger = logging.getLogger(__name__)


def write_comparison(folders: Sequence[Path], out: Path, *, track: bool = False) -> Path:
    """Compare run folders, or the folders of sweeps: write comparison.html, .md and .csv into `out`.

    What `python -m alignment.evaluate` has left in `out` says how their answers do against each other.

    Args:
        track: send the comparison to where the members were tracked, too, as the run of the sweep in `out`. The first
            member that has settings says where.

    Returns:
        The path of the page.

    Raises:
        UserError: a folder neither is nor holds a run folder, or a file cannot be written (the others are written).
    """
    runs = run_folders(folders)
    found = compare([read_member(run, name) for run, name in zip(runs, short_names(runs), strict=True)])
    found.between, found.evaluated_in = read_between(out, found.members), out
    title = f"Comparison: {out.resolve().name}"
    pages = {"md": to_markdown(found, title), "csv": to_csv(found), "html": to_html(found, title)}
    failed = []
    for kind, text in pages.items():
        try:
            write_page(out / f"comparison.{kind}", text)
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError(" ".join(failed))
    logger.info("All members side by side: %s", out / "comparison.html")
    tracking = next((member.run.config.get("tracking") for member in found.members if member.run.config), None)
    if track and isinstance(tracking, dict):
        send_summary(tracking, out, sweep_summary(found, [out / f"comparison.{kind}" for kind in pages]))
    return out / "comparison.html"
