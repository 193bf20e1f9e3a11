"""MLflow: a run in the experiment named after the project, in MLflow's own store or the one that you name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.config.schema import TrackingConfig
from alignment.files import atomic_write_text, to_json
from alignment.runs.alerts import Alert
from alignment.runs.record import STAGES
from alignment.runs.trackers.base import Cell, Key, Row, Service, Told, flat_values, prefix

# MLflow would report each use to its makers, and try a server that does not answer for minutes.
for _name, _value in (
    ("MLFLOW_DISABLE_TELEMETRY", "true"),
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
    ("MLFLOW_HTTP_REQUEST_TIMEOUT", "30"),
):
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param  # noqa: E402

_ID_FILE = "mlflow_run_id"
_MOST_AT_ONCE = 100
"""Parameters that its store takes in one call."""
_LONGEST = 6000
"""Characters of a parameter or a tag."""
_ODD = re.compile(r"[^\w\-. :/]")
"""What it takes in no name."""


class MLflowRun(Service):
    """A run of MLflow. Runs of a sweep have its name in the tag `group`, and each its `job_type`."""

    title = "MLflow"

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self._client = client
        self.run_id = run_id
        self.sent = self._rows_there()

    def _rows_there(self) -> set[Key]:
        return {
            (stage, metric.step, split)
            for stage in STAGES
            for split in ("train", "eval")
            for metric in self._client.get_metric_history(self.run_id, f"{prefix(stage)}{split}/loss")
        }

    def row(self, row: Row) -> None:
        """Send its metrics at once."""
        at = round(row.seconds * 1000)
        metrics = [Metric(_ODD.sub("_", name), value, at, row.step) for name, value in row.named.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def alert(self, alert: Alert) -> None:
        """Make it a tag, by which runs can be found."""
        state = f"over at {alert.stage} step {alert.step}" if alert.is_over else alert.text
        self._client.set_tag(self.run_id, f"alert {alert.kind}", state[:_LONGEST])

    def table(self, name: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Keep it as MLflow's tables are, a JSON file with columns and data."""
        content = {"columns": list(header), "data": [list(row) for row in rows]}
        self._client.log_text(self.run_id, to_json(content).decode(), f"tables/{name}.json")

    def figure(self, name: str, figure: Any) -> None:
        """Keep it as a page."""
        self._client.log_text(self.run_id, figure.to_html(include_plotlyjs="cdn"), f"figures/{name}.html")

    def files(self, kind: str, paths: Sequence[Path]) -> None:
        """Keep them as artifacts."""
        for path in paths:
            self._client.log_artifact(self.run_id, str(path), kind)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Keep it as an artifact."""
        self._client.log_text(self.run_id, to_json(values, indent=2).decode(), "summary.json")

    def finish(self, exit_code: int) -> None:
        """Mark it as finished or failed."""
        self._client.set_terminated(self.run_id, "FINISHED" if exit_code == 0 else "FAILED")


def open_service(config: TrackingConfig, told: Told, rows: Sequence[Row], team: Any) -> MLflowRun:
    """Start the run, or go on with the one whose id the folder has in `mlflow_run_id`."""
    del rows, team
    id_file = told.folder / _ID_FILE
    client = MlflowClient(config.uri)
    if id_file.exists():
        run_id = id_file.read_text().strip()
        client.update_run(run_id, "RUNNING")
        return MLflowRun(client, run_id)
    tags = {"group": told.group, "job_type": told.job_type, "tags": ", ".join(told.tags)}
    if told.notes is not None:
        tags["mlflow.note.content"] = told.notes
    begun = client.create_run(_experiment(client, config.project), run_name=told.name, tags=tags)
    told.folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(id_file, f"{begun.info.run_id}\n")
    params = [Param(_ODD.sub("_", name), str(value)[:_LONGEST]) for name, value in flat_values(told.config).items()]
    for start in range(0, len(params), _MOST_AT_ONCE):  # once: it lets nobody change a parameter
        client.log_batch(begun.info.run_id, params=params[start : start + _MOST_AT_ONCE])
    return MLflowRun(client, begun.info.run_id)


def _experiment(client: MlflowClient, name: str) -> str:
    """The id of the experiment of this name, which another run may be making just now."""
    from mlflow.exceptions import MlflowException

    if (found := client.get_experiment_by_name(name)) is not None:
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return found.experiment_id
