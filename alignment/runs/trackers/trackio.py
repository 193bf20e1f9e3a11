"""trackio: a run in a database on this machine, which `trackio show` opens in a browser."""

from __future__ import annotations

import contextlib
import io
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trackio
from trackio.alerts import AlertLevel
from trackio.sqlite_storage import SQLiteStorage

from alignment.config.schema import TrackingConfig
from alignment.files import atomic_write_text
from alignment.runs.alerts import Alert
from alignment.runs.record import STAGES
from alignment.runs.text import markdown_table
from alignment.runs.trackers.base import MARGINS, Cell, Key, Row, Service, Told, flat_values, prefix

_ID_FILE = "trackio_run_id"


class _LocalRun(trackio.Run):
    """A run that asks no server who you are, which `trackio.init` does."""

    def _get_username(self) -> None:
        return None


class TrackioRun(Service):
    """A run of trackio, with nothing of its own on the screen."""

    title = "trackio"

    def __init__(self, told: Told, project: str, run_id: str) -> None:
        self.run_id = run_id
        self._step = 0
        SQLiteStorage.init_db(project)
        self.sent = _rows_there(project, told.name, run_id)
        self._run = _LocalRun(
            None,
            project,
            None,
            name=told.name,
            run_id=run_id,
            group=told.group,
            config=dict(told.config) | {"job_type": told.job_type, "tags": list(told.tags)},
        )

    def row(self, row: Row) -> None:
        """Queue it: a thread writes the database twice a second."""
        self._step = row.step
        found: dict[str, Any] = dict(row.named)
        if row.margins is not None:
            histogram = np.array(row.margins.counts), np.array(row.margins.edges)
            found[f"{row.split}/{MARGINS}"] = trackio.Histogram(np_histogram=histogram)
        self._run.log(found, step=row.step)

    def alert(self, alert: Alert) -> None:
        """Queue it; trackio tells the webhook that its user has set, if there is one."""
        level = AlertLevel.INFO if alert.is_over else AlertLevel.WARN
        with contextlib.redirect_stdout(io.StringIO()):  # the log has it already
            self._run.alert(alert.kind, alert.text, level=level, step=alert.step)

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Queue it at the newest step."""
        table = trackio.Table(columns=list(header), data=[list(row) for row in rows])
        self._run.log({name: table}, step=self._step)

    def files(self, kind: str, paths: Sequence[Path]) -> None:
        """Queue the pages of Markdown; the folder of the run has the rest."""
        for path in paths:
            if path.suffix == ".md":
                self._run.log({f"{kind}/{path.stem}": trackio.Markdown(path.read_text("utf-8"))}, step=self._step)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Queue it as a page."""
        shown = [[name, str(value)] for name, value in flat_values(values).items()]
        self._run.log({"summary": trackio.Markdown(markdown_table(["name", "value"], shown))}, step=self._step)

    def finish(self, exit_code: int) -> None:
        """Wait until all is written, at most half a minute."""
        self._run.log({"exit_code": exit_code}, step=self._step)
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


def _rows_there(project: str, name: str, run_id: str) -> set[Key]:
    logs = SQLiteStorage.get_logs(project, name, run_id=run_id)
    return {
        (stage, log["step"], split)
        for log in logs
        for stage in STAGES
        for split in ("train", "eval")
        if f"{prefix(stage)}{split}/loss" in log
    }


def open_service(config: TrackingConfig, told: Told, rows: Sequence[Row], team: Any) -> TrackioRun:
    """Start the run, or go on with the one whose id the folder has in `trackio_run_id`."""
    del rows, team
    id_file = told.folder / _ID_FILE
    run_id = id_file.read_text().strip() if id_file.exists() else uuid.uuid4().hex
    told.folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(id_file, f"{run_id}\n")
    return TrackioRun(told, config.project, run_id)
