"""The tracking of a run: everything that its record gets goes to each service that it is tracked with."""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from alignment.config.schema import MAX_NAME, TrackingConfig
from alignment.errors import UserError
from alignment.runs.alerts import Alert, Watch
from alignment.runs.folder import sweep_name
from alignment.runs.record import LINE_KEYS, Histogram, read_margins, read_metrics
from alignment.runs.trackers.base import Cell, Row, Service, Told, sendable

if TYPE_CHECKING:
    from alignment.ranks.team import Team


logger = logging.getLogger(__name__)


class Tracker:
    """Sends a run to services while it goes on; without any it sends nothing.

    An error in a service is logged once and ends the tracking by it, never the training. The run folder has all numbers
    anyway.

    Args:
        services: that have opened the run.
        rows: of its record so far. Each service is sent those that it lacks, with their alerts.
    """

    def __init__(self, services: Sequence[Service] = (), rows: Sequence[Row] = ()) -> None:
        self.services = list(services)
        watch = Watch()
        for row in rows:
            alerts = watch.see(row.stage, row.step, row.split, row.metrics)
            lacking = [service for service in self.services if row.key not in service.sent]
            self._send(row, lacking)
            for alert in alerts:
                self._alert(alert, lacking)
        for service in self.services:
            service.sent.update(row.key for row in rows)

    def log(
        self, stage: str, step: int, split: str, metrics: Mapping[str, float], margins: Histogram | None = None
    ) -> None:
        """Send one row to those that do not have it from before a resume.

        Args:
            split: "train" or "eval".
            metrics: under the names of metrics.jsonl.
            margins: of the single pairs, for an evaluation that has them.
        """
        row = Row(stage, step, split, metrics, time.time(), margins)
        self._send(row, [service for service in self.services if row.key not in service.sent])

    def alert(self, alert: Alert) -> None:
        """Send what is found in a row, to those that do not have the row from before a resume."""
        key = alert.stage, alert.step, alert.split
        self._alert(alert, [service for service in self.services if key not in service.sent])

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Send a table; a later one of this name takes its place."""
        self._each(self.services, lambda service: service.table(name, header, rows))

    def figure(self, name: str, figure: Any) -> None:
        """Send a Plotly figure to those that show such."""
        self._each(self.services, lambda service: service.figure(name, figure))

    def files(self, kind: str, paths: Sequence[Path]) -> None:
        """Send files at the end of the run."""
        self._each(self.services, lambda service: service.files(kind, paths))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values; secrets are masked."""
        masked = sendable(values)
        self._each(self.services, lambda service: service.summary(masked))

    def finish(self, exit_code: int = 0) -> None:
        """Close the runs."""
        self._each(self.services, lambda service: service.finish(exit_code))
        self.services = []

    def _send(self, row: Row, to: Sequence[Service]) -> None:
        self._each(to, lambda service: service.row(row))

    def _alert(self, alert: Alert, to: Sequence[Service]) -> None:
        self._each(to, lambda service: service.alert(alert))

    def _each(self, to: Sequence[Service], action: Callable[[Service], None]) -> None:
        for service in [service for service in to if service in self.services]:
            try:
                action(service)
            except Exception as error:
                self.services.remove(service)
                why = " ".join(str(error).split())
                logger.warning("%s failed and gets nothing more of this run; training goes on: %s", service.title, why)
                with suppress(Exception):  # what it got so far may wait to be written or sent
                    service.finish(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(0 if kind is None else 1)


def open_tracker(
    config: TrackingConfig | None,
    *,
    run_dir: Path,
    recipe: str,
    run_config: Mapping[str, Any],
    stages: Sequence[str],
    team: Team | None = None,
) -> Tracker:
    """Start the tracker of a run.

    A resumed run continues the same run in each service and sends each row once: it sends rows that a kill kept back,
    and does not send the rows again that it repeats (metrics.jsonl has their latest values).

    Raises:
        UserError: a service that the configuration asks for refuses the login.
    """
    if config is None:
        return Tracker()
    sweep = sweep_name(run_dir)
    name = run_dir.name if sweep else f"{recipe}-{run_dir.name}"
    told = Told(
        folder=run_dir,
        name=config.name or name[:MAX_NAME],
        group=config.group or (sweep or recipe)[:MAX_NAME],
        job_type="sweep member" if sweep else "+".join(stages),
        config=sendable(run_config),
        tags=config.tags,
    )
    rows = recorded(run_dir)
    return Tracker(open_services(config, told, rows, team), rows)


def open_services(config: TrackingConfig, told: Told, rows: Sequence[Row], team: Team | None = None) -> list[Service]:
    """A run in each service of the configuration; one that fails is named and left out.

    Args:
        rows: the record of the run so far.
    """
    found: list[Service] = []
    for name in config.to:
        module = importlib.import_module(f"alignment.runs.trackers.{name}")
        try:
            service = module.open_service(config, told, rows, team)
        except UserError:
            Tracker(found).finish(1)
            raise
        except Exception as error:
            why = " ".join(str(error).split())
            logger.warning("tracking.to=%s failed and gets nothing of this run; training goes on: %s", name, why)
            continue
        if service is not None:
            found.append(service)
    return found


def recorded(run_dir: Path) -> list[Row]:
    """The rows that the record of a run has, with the margins of its evaluations."""
    path = run_dir / "metrics.jsonl"
    margins = read_margins(run_dir)
    return [
        Row(
            row["stage"],
            row["step"],
            row["split"],
            {name: value for name, value in row.items() if name not in LINE_KEYS},
            datetime.fromisoformat(row["time"]).timestamp(),
            margins.get(row["step"]) if (row["stage"], row["split"]) == ("preference", "eval") else None,
        )
        for row in (read_metrics(path) if path.exists() else [])
    ]
