"""What TensorBoard, MLflow and trackio hold of a run, by their own readers; each where it is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.config.schema import TrackingConfig
from alignment.runs.alerts import COLLAPSE, Alert
from alignment.runs.record import Histogram, RunRecord
from alignment.runs.sweep_tracking import SweepSummary, send_summary
from alignment.runs.tracking import Tracker, open_tracker
from tests.helpers.tracked import tracking_config

MARGINS = Histogram([0.0, 1.0, 2.0], [3, 1])
SECRET = "PlantedSecret"


class TensorBoard:
    """Reads event files as TensorBoard does."""

    def __init__(self, home: Path, run_dir: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        self.files = run_dir / "tensorboard"
        sizes = {"scalars": 0, "tensors": 0, "histograms": 0, "images": 0}
        self.found = EventAccumulator(str(self.files), size_guidance=sizes).Reload()

    def scalars(self, name: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in self.found.Scalars(name)]

    def _text(self, name: str) -> str:
        (*_, last) = self.found.Tensors(f"{name}/text_summary")
        return last.tensor_proto.string_val[0].decode()

    def setting(self, name: str) -> str:
        lines = [line.split("|") for line in self._text("settings").splitlines()]
        return next(html.unescape(cells[2].strip()) for cells in lines if cells[1].strip() == name)

    def alerts(self) -> list[str]:
        events = self.found.Tensors("alerts/preference/text_summary")
        return [event.tensor_proto.string_val[0].decode() for event in events]

    def histogram(self) -> tuple[int, list[float]]:
        (event,) = self.found.Histograms("eval/rewards/margins/histogram")
        value = event.histogram_value
        return event.step, [count for count in value.bucket if count]

    def table(self, name: str) -> list[list[str]]:
        lines = [line.strip("| ").split(" | ") for line in self._text(name).splitlines()]
        return [lines[0], *lines[2:]]

    def ended_well(self) -> bool:
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

        content = self.found.SummaryMetadata(SESSION_END_INFO_TAG).plugin_data.content
        return HParamsPluginData.FromString(content).session_end_info.status == Status.Value("STATUS_SUCCESS")


class MLflow:
    """Asks MLflow's client."""

    def __init__(self, home: Path, run_dir: Path) -> None:
        from mlflow import MlflowClient

        self.files, self.run_dir = home, run_dir
        self.client = MlflowClient(f"sqlite:///{home}/mlflow.db")
        (self.run,) = self.client.search_runs([self.client.get_experiment_by_name("p").experiment_id])

    def scalars(self, name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in self.client.get_metric_history(self.run.info.run_id, name)]

    def setting(self, name: str) -> str:
        return self.run.data.params[name]

    def alerts(self) -> list[str]:
        return [value for name, value in self.run.data.tags.items() if name.startswith("alert ")]

    def histogram(self) -> None:
        return None

    def table(self, name: str) -> list[list[str]]:
        path = self.client.download_artifacts(self.run.info.run_id, f"tables/{name}.json")
        found = json.loads(Path(path).read_text())
        return [found["columns"], *([str(cell) for cell in row] for row in found["data"])]

    def ended_well(self) -> bool:
        assert self.run.info.run_id == (self.run_dir / "mlflow_run_id").read_text().strip()
        assert (self.run.data.tags["group"], self.run.info.run_name) == ("quickstart", "quickstart-run")
        return self.run.info.status == "FINISHED"


class Trackio:
    """Asks trackio's Python interface, and its database where that has no question for it."""

    def __init__(self, home: Path, run_dir: Path) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self.files = home
        (self.run,) = [run for run in trackio.Api().runs("p") if run.name == "quickstart-run"]
        self.logs = SQLiteStorage.get_logs("p", self.run.name, run_id=self.run.id)
        assert self.run.id == (run_dir / "trackio_run_id").read_text().strip()

    def scalars(self, name: str) -> list[tuple[int, float]]:
        return [(log["step"], log[name]) for log in self.logs if name in log]

    def setting(self, name: str) -> str:
        value: Any = self.run.config
        for key in name.split("."):
            value = value[key]
        return str(value)

    def alerts(self) -> list[str]:
        return [alert["text"] for alert in self.run.alerts()]

    def histogram(self) -> tuple[int, list[float]]:
        ((step, found),) = self.scalars("eval/rewards/margins/histogram")
        return step, found["values"]

    def table(self, name: str) -> list[list[str]]:
        (*_, (_, found)) = self.scalars(name)
        return [list(found["_value"][0]), *([str(cell) for cell in row.values()] for row in found["_value"])]

    def ended_well(self) -> bool:
        return self.scalars("exit_code")[-1][1] == 0


READERS = {"tensorboard": TensorBoard, "mlflow": MLflow, "trackio": Trackio}


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where services keep what is not of one run; trackio looks for it when it is imported."""
    home = tmp_path_factory.mktemp("homes")
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(home / "trackio")
    yield home
    os.environ.pop("TRACKIO_DIR") if before is None else os.environ.update(TRACKIO_DIR=before)


@pytest.fixture(params=list(READERS))
def service(request: pytest.FixtureRequest, homes: Path) -> str:
    pytest.importorskip(request.param, reason=f"TRACKER ABSENT: {request.param} is not installed: this did not run")
    return request.param


def settings(service: str, homes: Path) -> TrackingConfig:
    return tracking_config(to=[service], uri=f"sqlite:///{homes}/mlflow.db" if service == "mlflow" else None)


def start(service: str, homes: Path, run_dir: Path) -> Tracker:
    return open_tracker(
        settings(service, homes),
        run_dir=run_dir,
        recipe="quickstart",
        run_config={"optim": {"lr": 1e-4}, "hf_token": SECRET, "data": {"sources": {"a": {"limit": None}}}},
        stages=["sft", "preference"],
    )


def row(record: RunRecord, tracker: Tracker | None, *key: Any, margins: Histogram | None = None, **more: float) -> None:
    stage, step, split = key
    metrics = {"loss": float(step), **more}
    record.log(stage, step, split, metrics)
    if margins is not None:
        record.log_margins(step, margins)
    if tracker is not None:
        tracker.log(stage, step, split, metrics, margins)


@pytest.fixture(scope="module")
def runs(homes: Path) -> dict[str, Path]:
    return {}


@pytest.fixture
def reader(service: str, homes: Path, runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a run that was interrupted: the service lacks one row of the record, and the resume repeats another one."""
    if service not in runs:
        with contextlib.chdir(homes):  # where MLflow keeps its artifacts
            runs[service] = run_dir = tmp_path_factory.mktemp(service) / "run"
            record = RunRecord(run_dir)
            tracker = start(service, homes, run_dir)
            row(record, tracker, "sft", 1, "train")
            row(record, tracker, "preference", 0, "eval", margins=MARGINS)
            row(record, tracker, "preference", 1, "train", nats=math.nan)
            tracker.alert(Alert(COLLAPSE, "it fell", "preference", 1, "train"))
            tracker.finish(1)
            row(record, None, "preference", 2, "train")
            with start(service, homes, run_dir) as tracker:
                tracker.alert(Alert(COLLAPSE, "it fell", "preference", 1, "train"))
                tracker.log("preference", 2, "train", {"loss": 2.0})
                tracker.log("preference", 3, "train", {"loss": 3.0, "odd name (%)/x": 1.0})
                tracker.table("samples", ["prompt", "final"], [["a", "old"]])
                tracker.table("samples", ["prompt", "final"], [["a", "b"], ["c", None]])
                (run_dir / "report.md").write_text("# Report\n")
                tracker.files("report", [run_dir / "report.md"])
                tracker.summary({"status": "finished", "api_key": SECRET})
    return READERS[service](homes / "trackio" if service == "trackio" else homes, runs[service])


@pytest.mark.slow
def test_every_row_is_there_once(reader: Any) -> None:
    assert reader.scalars("sft/train/loss") == [(1, 1.0)]
    assert sorted(reader.scalars("train/loss")) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert reader.scalars("eval/loss") == [(0, 0.0)]
    ((step, value),) = reader.scalars("train/nats")
    assert step == 1 and (value is None or math.isnan(float(value)))
    assert reader.ended_well()


@pytest.mark.slow
def test_beyond_scalars(reader: Any) -> None:
    """Settings, alerts, margins and tables; one alert, however often a resume finds it."""
    assert float(reader.setting("optim.lr")) == 1e-4 and reader.setting("hf_token") == "***"
    told = [text for text in reader.alerts() if "it fell" in text]
    assert len(told) == 1
    assert reader.histogram() in (None, (0, [3, 1]))
    assert reader.table("samples")[0] == ["prompt", "final"]
    assert [cells[0] for cells in reader.table("samples")[1:]] == ["a", "c"]


@pytest.mark.slow
def test_no_secret_reaches_it(reader: Any, runs: dict[str, Path]) -> None:
    files = [path for folder in (reader.files, *runs.values()) for path in folder.rglob("*") if path.is_file()]
    assert files and not any(SECRET.encode() in path.read_bytes() for path in files)


@pytest.mark.slow
def test_a_sweep_is_one_run_in_the_group(
    service: str, homes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import plotly.graph_objects as go

    sweep = tmp_path / "betas"
    sweep.mkdir()
    (sweep / "comparison.md").write_text("# Comparison\n")
    summary = SweepSummary(
        facts={"model": "tiny"},
        notes="- DPO is first",
        values={"best": {"value": 0.75}},
        header=["variant", "beta"],
        rows=[["DPO", 0.1], ["IPO", None]],
        figures={"curve": go.Figure().add_scatter(x=[1, 2], y=[3.0, 4.0])},
        files=[sweep / "comparison.md"],
    )
    with contextlib.chdir(homes):
        config = dataclasses.asdict(dataclasses.replace(settings(service, homes), project=f"sweeps-{service}"))
        send_summary(config, sweep, summary)
    assert [line for line in caplog.messages if "failed" in line] == []
    if service == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{homes}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("sweeps-mlflow").experiment_id])
        assert (run.data.tags["group"], run.data.tags["job_type"]) == ("betas", "sweep summary")
        kept = {entry.path for entry in client.list_artifacts(run.info.run_id)}
        assert kept == {"tables", "figures", "comparison", "summary.json"}


def test_a_service_that_fails_ends_alone(homes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of two fails while the run goes on; the other one gets all."""

    class Sound:
        title, run_id = "sound", "1"

        def __init__(self) -> None:
            self.sent: set[Any] = set()
            self.got: list[int] = []

        def row(self, row: Any) -> None:
            self.got.append(row.step)

        def finish(self, exit_code: int) -> None:
            self.got.append(-1 - exit_code)

    class Broken(Sound):
        def row(self, row: Any) -> None:
            raise OSError("the disk\nis full")

    sound: Any = Sound()
    broken: Any = Broken()
    with Tracker([broken, sound]) as tracker:
        for step in (1, 2):
            tracker.log("sft", step, "train", {"loss": 1.0})
    assert (sound.got, broken.got) == ([1, 2, -1], [-2])
    assert caplog.messages == ["sound failed and gets nothing more of this run; training goes on: the disk is full"]
