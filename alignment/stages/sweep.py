"""The runs of a sweep: a finished member stays, a begun one goes on, and a failing one does not stop the others."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from alignment.config.sweep import Sweep
from alignment.errors import UserError, disk_problem
from alignment.files import atomic_write_bytes, file_lock, to_json

log = logging.getLogger(__name__)

FAILED = "failed.json"
"""In the folder of a member: why it has no result."""


def attempt(run_dir: Path, run: Callable[[], None]) -> None:
    """Run a member unless it is finished; its failure is logged and kept in its folder.

    The folder is locked meanwhile: jobs of a launcher may outlive the command that started them, and you may start the
    command again.
    """
    with file_lock(run_dir / ".lock", f"Another process runs {run_dir.name}; waiting for its end ..."):
        failed = run_dir / FAILED
        failed.unlink(missing_ok=True)
        try:
            if not (run_dir / "summary.json").exists():
                run()
                return
            log.info("%s is finished already.", run_dir.name)
            if not (run_dir / "report.md").exists():  # it was killed between the two
                from alignment.runs.report import write_report

                write_report(run_dir)
        except Exception as error:
            problem = disk_problem(error)
            if isinstance(error, UserError) or problem is not None:
                sentence = str(error) if problem is None else f"{problem}."
                log.error("Error: %s", sentence)
            else:
                sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"
                log.exception("%s failed", run_dir.name)
            atomic_write_bytes(failed, to_json({"error": sentence}))
        finally:
            gc.collect()  # the next member of this process finds the memory free


def member_folders(sweep: Sweep) -> list[Path]:
    """The folders of all members, also of those that only the sweeper knew."""
    return [m.folder for m in sweep.members] or sorted(path.parent for path in sweep.folder.glob("*/.hydra"))


def members_without_result(folders: Sequence[Path]) -> list[str]:
    """A sentence for each member without a result; waits for members that still run."""
    for folder in folders:
        if folder.exists():
            # A launcher that gives up for one job may leave others running.
            with file_lock(folder / ".lock", f"Another process runs {folder.name}; waiting for its end ..."):
                pass
    problems = []
    for folder in folders:
        if (folder / FAILED).exists():
            problems.append(f"{folder.name} failed: {json.loads((folder / FAILED).read_bytes())['error']}")
        elif not (folder / "summary.json").exists():
            problems.append(f"{folder.name} did not end.")
    return problems
