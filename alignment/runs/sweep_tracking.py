"""One run for a whole sweep, beside the runs of its members, in whatever these are tracked with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from alignment.config.compose import defaults
from alignment.config.schema import MAX_NAME, TrackingConfig
from alignment.errors import require
from alignment.runs.trackers.base import Told, sendable
from alignment.runs.tracking import Tracker, open_services

logger = logging.getLogger(__name__)

_SECTION = "comparison"


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """The result of a sweep.

    Attributes:
        facts: settings and data, sent as the configuration of the run.
        notes: the result in Markdown.
        values: single numbers that compare sweeps.
        header, rows: a table; each cell of the rows is a number, a text or None.
        figures: Plotly figures by name.
        files: sent together as one artifact.
    """

    facts: Mapping[str, str]
    notes: str
    values: Mapping[str, Any]
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    figures: Mapping[str, Any]
    files: Sequence[Path]


def send_summary(config: Mapping[str, Any], folder: Path, summary: SweepSummary) -> None:
    """Send it as a run in the group of the sweep's members. A resumed sweep continues its run.

    An error is logged and has no further effect.

    Args:
        config: the tracking settings of a member. Those that an earlier version did not know have their defaults.
        folder: folder of the sweep, after which the group and the run are named.
    """
    try:
        settings, name = _settings(config), folder.absolute().name
        told = Told(
            folder=folder,
            name=name[:MAX_NAME],
            group=settings.group or name[:MAX_NAME],
            job_type="sweep summary",
            config=sendable(summary.facts),
            notes=summary.notes,
            tags=settings.tags,
        )
        with Tracker(open_services(settings, told, ())) as tracker:
            tracker.table(f"{_SECTION}/variants", summary.header, summary.rows)
            for title, figure in summary.figures.items():
                tracker.figure(f"{_SECTION}/{title}", figure)
            tracker.files(_SECTION, summary.files)
            tracker.summary(summary.values)
    except Exception as error:
        logger.warning("Tracking failed and gets no summary of the sweep: %s", error)


def _settings(config: Mapping[str, Any]) -> TrackingConfig:
    known = {field.name for field in fields(TrackingConfig)}
    for key in config:
        require(key in known, f"its members have tracking.{key}, which this version does not know.")
    usual = defaults()["tracking"] if known - config.keys() else {}
    return TrackingConfig(**{**usual, **config})
