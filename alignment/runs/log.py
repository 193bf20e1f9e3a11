"""Where all that a run tells while it goes on is written down: its record, its trackers, and alerts in the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from alignment.runs.alerts import UNSTABLE, Alert, Watch
from alignment.runs.record import Histogram, RunRecord, read_metrics
from alignment.runs.tracked_tables import samples_table
from alignment.runs.tracking import Tracker
from alignment.training.callbacks import LogFunction

logger = logging.getLogger(__name__)


class RunLog:
    """Gives each row to the record, then to the trackers, and says what it finds in it."""

    def __init__(self, record: RunRecord, tracker: Tracker) -> None:
        self.record = record
        self.tracker = tracker
        self._watch = Watch()

    def begin(self, stage: str, step: int) -> None:
        """Go on after this step of a stage; -1: the stage is new. Later rows of an earlier process are forgotten."""
        self.record.rewind(stage, step)
        path = self.record.metrics_path
        self._watch = Watch(read_metrics(path) if path.exists() else ())

    def of(self, stage: str) -> LogFunction:
        """Where a stage writes its rows down."""

        def log(step: int, split: str, metrics: Mapping[str, float], items: Sequence[Mapping[str, Any]] = ()) -> None:
            self.row(stage, step, split, metrics, items)

        return log

    def row(
        self,
        stage: str,
        step: int,
        split: str,
        metrics: Mapping[str, float],
        items: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write one row down.

        Args:
            split: "train" or "eval".
            items: the metrics of the single held-out pairs, if there are such.
        """
        values = [item["rewards/margins"] for item in items if "rewards/margins" in item]
        margins = Histogram.of(values) if values else None
        self.record.log(stage, step, split, metrics)
        if margins is not None:
            self.record.log_margins(step, margins)
        self.tracker.log(stage, step, split, metrics, margins)
        for alert in self._watch.see(stage, step, split, metrics):
            self._say(alert)

    def answers(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Tell the trackers what the policy has answered so far; rows as in samples.jsonl."""
        if samples:
            self.tracker.table("samples", *samples_table(samples))

    def stopped(self, stage: str, why: str) -> None:
        """Tell the trackers that a stage has met a number that is not finite, with which no row is written."""
        self.tracker.alert(Alert(UNSTABLE, why, stage, self._watch.step, ""))

    def _say(self, alert: Alert) -> None:
        logger.log(logging.INFO if alert.is_over else logging.WARNING, "%s", alert.text)
        self.tracker.alert(alert)
