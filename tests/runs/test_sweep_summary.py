"""The W&B run of a sweep: its summary, sent once however often the sweep ends."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from alignment.runs.sweep_tracking import SweepSummary, send_summary
from tests.helpers.tracked import nobody_logged_in, tracking_config
from tests.helpers.wandb_files import history, of_kind, read_wandb

__all__ = ["nobody_logged_in"]


def a_summary(folder: Path, best: float = 0.75) -> SweepSummary:
    import plotly.graph_objects as go

    folder.mkdir(exist_ok=True)
    (folder / "comparison.csv").write_text(f"best,{best}\n")
    return SweepSummary(
        facts={"model": "tiny", "api_key": "s3cret"},
        notes="- DPO is first",
        values={"best": {"variant": "DPO", "value": best}},
        header=["variant", "beta", "rank"],
        rows=[["DPO", 0.1, 1.0], ["IPO", None, 2.0], ["KTO", "auto", 3.0]],
        figures={"curve": go.Figure().add_scatter(x=[1, 2], y=[3.0, 4.0])},
        files=[folder / "comparison.csv"],
    )


def test_the_summary_of_a_sweep_is_one_run_however_often_it_ends(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nobody_logged_in.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    sweep = tmp_path / "betas"
    ids = set()
    for best in (0.75, 0.5):
        send_summary(asdict(tracking_config(name="mine", tags=["lab"])), sweep, a_summary(sweep, best))
        ids.add((sweep / "wandb_run_id").read_text())
    assert len(ids) == 1
    said = [record.getMessage() for record in caplog.records if record.name.startswith("alignment")]
    assert len(said) == 2 and all("keeps this run offline" in line for line in said)
    for folder, best in zip(sorted(sweep.glob("wandb/offline-run-*")), (0.75, 0.5), strict=True):
        records = read_wandb(folder)
        [run] = of_kind(records, "run")
        assert {f"{run.run_id}\n"} == ids
        assert (run.project, run.run_group, run.job_type, run.display_name) == ("p", "betas", "sweep summary", "betas")
        assert (run.notes, list(run.tags)) == ("- DPO is first", ["lab"])
        facts = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (facts["model"], facts["api_key"]) == ("tiny", "***")
        [row] = history(records)
        table = json.loads((folder / "files" / row["comparison/variants/path"]).read_text())
        assert table["columns"] == ["variant", "beta", "rank"]
        assert table["data"] == [["DPO", 0.1, 1], ["IPO", None, 2], ["KTO", "auto", 3]]
        figure = json.loads((folder / "files" / row["comparison/curve/path"]).read_text())
        assert figure["data"][0]["y"] == [3.0, 4.0]
        kept = {artifact.type: artifact for artifact in of_kind(records, "artifact")}["comparison"]
        [entry] = kept.manifest.contents
        assert entry.path == "comparison.csv"
        assert Path(entry.local_path).read_text() == f"best,{best}\n"
        values = {item.key: item.value_json for summary in of_kind(records, "summary") for item in summary.update}
        assert json.loads(values["best"]) == {"variant": "DPO", "value": best}
        assert [end.exit_code for end in of_kind(records, "exit")] == [0]


def test_members_of_an_earlier_version_are_tracked_as_then(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before `tracking.to` there was W&B alone."""
    nobody_logged_in.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    then = asdict(tracking_config())
    for key in ("to", "system", "uri"):
        del then[key]
    send_summary(then, tmp_path / "betas", a_summary(tmp_path / "betas"))
    assert [run.project for run in of_kind(read_wandb(*(tmp_path / "betas").glob("wandb/offline-run-*")), "run")] == [
        "p"
    ]
    assert not [line for line in caplog.messages if "failed" in line]


def test_no_summary_where_nothing_is_tracked_or_something_is_wrong(
    tmp_path: Path, nobody_logged_in: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    summary = a_summary(tmp_path)
    send_summary({"project": "p", "from": "another version"}, tmp_path, summary)
    why = "its members have tracking.from, which this version does not know."
    assert caplog.messages == [f"Tracking failed and gets no summary of the sweep: {why}"]
    nobody_logged_in.setenv("WANDB_MODE", "disabled")
    send_summary(asdict(tracking_config(mode="online")), tmp_path, summary)
    assert len(caplog.messages) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.csv"]
